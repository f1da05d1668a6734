"""``softprompt-fast compress``, and the tutorial of ``docs/compress.md`` on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import pytest
import torch
import typer
from support.tiny_models import VOCABULARY, build
from support.tiny_reviews import WORDS, run, tiny_tokenizer
from support.tiny_text import CHAT_TEMPLATE, TEXT, TURNS, queries
from typer.testing import CliRunner

from softprompt_fast import SoftPromptModel
from softprompt_fast.cli.app import app
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.hf import load_base_model
from softprompt_fast.tasks import load_rows

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTIONS = typer.main.get_command(app).commands["compress"].params  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a model whose tokenizer has a chat template, the text and the queries."""
    more = [f"word{i}" for i in range(len(WORDS) + len(TURNS), VOCABULARY)]
    tokenizer = tiny_tokenizer(*TURNS, *more)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "system.txt").write_text(TEXT)
    for name, rows in (("queries", queries()), ("new", queries(3))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SOFTPROMPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def error_of(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compress", "-m", "model", *arguments])
    assert isinstance(result.exception, (ValueError, OSError)), result.output
    return str(result.exception)


def tutorial(language: str) -> list[str]:
    """The blocks of the tutorial, with the tiny model's name and smaller numbers."""
    page = (ROOT / "docs" / "compress.md").read_text()
    found = [text for name, text in BLOCK.findall(page) if name == language]
    smaller = {MODEL: "model", "4,16,64": "2,4", "4, 16, 64": "2, 4", "--self-queries 200": "--self-queries 10"}
    smaller |= {"--tokens 64": "--tokens 4 --steps 2", "tokens=64": "tokens=4, steps=2", "-tokens 50": "-tokens 4"}
    smaller |= {"prompt-16": "prompt-4", "--steps 100": "--steps 6", "--max-new-tokens 100": "--max-new-tokens 4"}
    for old, new in smaller.items():
        found = [text.replace(old, new) for text in found]
    return found


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source tree")
def test_the_tutorial_runs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, use, self_made = (shlex.split(text.replace("\\\n", " "))[1:] for text in tutorial("")[:3])
    shown = run(*first, "--dtype", "float32").output
    assert "Retention on 5 held-out queries" in shown and "recommended: " in shown
    recommended = re.search(r"use it: softprompt-fast generate --prompt (\S+)", shown)
    assert recommended and (folder / recommended[1] / "task.json").is_file()
    answers = [json.loads(line) for line in run(*use, "--dtype", "float32").stdout.splitlines()]
    assert len(answers) == 3 and all(isinstance(answer["generated"], str) for answer in answers)
    run(*[word.replace("short", "self") for word in self_made], "--steps", "2", "--tokens", "4", "--dtype", "float32")
    assert len((folder / "self" / "queries.jsonl").read_text().splitlines()) == 10
    code, _, page, scorer, embeddings = tutorial("python")
    names: dict[str, Any] = {}
    exec(code.replace('"short"', '"python"').replace("chat=True", 'chat=True, steps=2, init="text"'), names)
    assert [prompt.tokens for prompt in names["result"].prompts] == [2, 4]
    exec(page, names)
    assert f"text of {names['result'].text_tokens} tokens" in (folder / "retention.html").read_text()
    exec(scorer, names)
    assert names["same_numbers"](["1 a", "2"], ["1 b", "3"]) == 0.5
    copyfile(folder / "python" / "prompt-4" / "adapter_model.safetensors", folder / "short-16.safetensors")
    exec(embeddings.replace("short/", "python/"), names)
    check_embeddings(names)
    assert len(list((folder / "cache" / "distillation").iterdir())) > 1


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source tree")
def test_the_tutorial_of_several_documents_runs(folder: Path) -> None:
    guides = ["hotel", "tram", "museum"]
    for i, name in enumerate(guides):
        (folder / f"{name}.txt").write_text(f"{TEXT} plot" + " dull film" * i)
    rows = [row | {"document": guides[i % 3]} for i, row in enumerate(queries())]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tutorial("")[3].replace("\\\n", " ").splitlines()
    compress, join, generate = (shlex.split(line.replace(r"\n", r"\\n"))[1:] for line in lines)
    assert "1 other beside it" in run(*compress, "--dtype", "float32").output
    run(*join)
    assert len(run(*generate, "--dtype", "float32").stdout.splitlines()) == 3
    for name in ("guides", "tram-museum"):
        rmtree(folder / name)
    names: dict[str, Any] = {"load_rows": load_rows}
    names["model"], names["tokenizer"] = load_base_model("model", "float32")
    exec(tutorial("python")[1], names)
    assert (folder / "tram-museum" / "task.json").is_file() and set(names["result"].prompts) == set(guides)


@torch.no_grad()
def check_embeddings(names: dict[str, Any]) -> None:
    """What a server reads gives the logits of the prompt's own model."""
    given = names["prompt_embeds"]
    assert len(given) == 4 + names["ids"].shape[1] and not given.requires_grad
    tuned = SoftPromptModel.from_pretrained(names["model"], "python/prompt-4")
    expected = tuned.next_token_logits(names["ids"], prompt_ids="prompt-4")
    torch.testing.assert_close(names["model"](inputs_embeds=given[None]).logits[:, -1], expected)


def test_options_that_would_be_ignored_are_refused(folder: Path) -> None:
    (folder / "other.txt").write_text(TEXT)
    several = ["--text", "system.txt", "--text", "other.txt", "-q", "queries.jsonl"]
    for option in (["--max-drop", "0.5"], ["--free-continuations", "3"], ["--name", "prompt"], ["--report", "x.html"]):
        assert error_of(*several, *option) == f"{option[0]} cannot be given for several --text files"
    assert "--tokens must be one number" in error_of(*several, "--tokens", "2,4")
    for option in (["--beside", "1"], ["--document-column", "document"]):
        assert error_of("--text", "system.txt", "-q", "queries.jsonl", *option) == (
            f"{option[0]} cannot be given for one --text file"
        )
    (folder / "my file.txt").write_text(TEXT)
    assert "--text must name files whose names are" in error_of("--text", "my file.txt", *several)


def test_no_input_is_overwritten_and_outputs_are_checked_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprompt_fast.hf import loading

    monkeypatch.setattr(loading, "load_base_model", None)
    given = ["--text", "system.txt", "-q", "queries.jsonl"]
    for file in ("system.txt", "queries.jsonl"):
        assert error_of(*given, "--report", file) == f"each output must be a file of its own, got {file} twice"
    assert "got new.jsonl twice" in error_of(*given, "--held-out", "new.jsonl", "--report", "new.jsonl")
    for place in ("system.txt", "system.txt/below"):
        assert error_of(*given, "-o", place).startswith(
            "--output must be a folder that can be written to, got system.txt"
        )
    assert error_of(*given, "--teacher-cache", "system.txt").startswith("--teacher-cache must be a folder")
    assert error_of(*given, "--figure", "a.jpg") == "a figure's file must end with .svg, .png or .pdf, got 'a.jpg'"
    template = ["--template", "{question}", "--text-column", "text"]
    assert error_of(*given, *template) == "--text-column must be a column that --template names, got text"
    (folder / "lines.txt").write_text("film\ndull\n")
    for option in (["--no-header"], ["--delimiter", ";"], ["--split", "train"], ["--config", "x"]):
        message = f"{option[0]} cannot be given for a text file, got lines.txt"
        assert error_of("--text", "system.txt", "-q", "lines.txt", *option) == message
    (folder / "held.csv").write_text("text;x\nfilm;1\n")
    assert "missing.jsonl" in error_of("--text", "system.txt", "-q", "lines.txt", "--held-out", "missing.jsonl")
    with pytest.raises(TypeError, match="NoneType"):  # both files are read, and the model comes next
        raise (
            CliRunner()
            .invoke(
                app,
                [
                    "compress",
                    "-m",
                    "model",
                    *given[:2],
                    "-q",
                    "lines.txt",
                    "--held-out",
                    "held.csv",
                    "--delimiter",
                    ";",
                ],
            )
            .exception
            or AssertionError
        )


def test_brackets_in_a_path_are_shown_as_they_are(folder: Path) -> None:
    command = ["compress", "-m", "model", "--text", "system.txt", "-q", "queries.jsonl", "-n", "2", "--steps", "1"]
    shown = run(*command, "--dtype", "float32", "-o", "out[v2]", "--report", "out[/b].html").output
    assert "--prompt out[v2]/prompt" in shown and "wrote out[/b].html" in shown


def test_a_text_file_of_queries_and_keys_and_values(folder: Path) -> None:
    (folder / "lines.txt").write_text("".join(f"{row['text']}\n" for row in queries()))
    command = ["compress", "-m", "model", "--text", "system.txt", "-q", "lines.txt", "--template", r"{text}\nLabel :"]
    run(*command, "-n", "3", "--form", "kv", "--steps", "2", "-o", "out", "--name", "mine", "--dtype", "float32",
        "--free-continuations", "2", "--report", "out/retention.html")  # fmt: skip
    found = json.loads((folder / "out" / "retention.json").read_text())
    assert found["free_queries"] == 2 and 0 <= found["prompts"][0]["retention"]["rouge_l"] <= 1
    assert "free continuations of 2" in (folder / "out" / "retention.html").read_text()
    task = json.loads((folder / "out" / "mine" / "task.json").read_text())
    assert task["template"] == "{text}\nLabel :" and task["model"] == "model" and task["prompt"] == "mine"
    assert json.loads((folder / "out" / "mine" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


def test_bad_input_is_refused_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprompt_fast.hf import loading

    monkeypatch.setattr(loading, "load_base_model", None)
    (folder / "empty.txt").write_text("\n")
    given = ["--text", "system.txt", "-q", "queries.jsonl"]
    assert "there are no queries" in error_of("--text", "system.txt") and "--self-queries" in error_of(*given[:2])
    assert error_of(*given, "--tokens", "four").startswith("--tokens must be whole numbers with commas between them")
    assert error_of(*given, "--tokens", "0") == "`tokens` must be integers of at least 1, got 0"
    assert "--init" in error_of(*given, "--keep-first", "--init", "pooled")
    assert error_of("--text", "empty.txt", "-q", "queries.jsonl") == "empty.txt must hold words, got an empty text"
    assert "each output must be a file of its own" in error_of(*given, "--report", "system.txt")
    assert "--free-continuations must be an integer from 0" in error_of(*given, "--free-continuations", "-1")
    assert "no.txt" in error_of("--text", "no.txt", "-q", "queries.jsonl")
    assert "no.jsonl" in error_of("--text", "system.txt", "-q", "no.jsonl")
    assert error_of("--text", "system.txt", "-q", "empty.txt") == "empty.txt must hold a query on each line, got none"


@pytest.mark.parametrize("name", [one.name for one in fields(DistillationSettings)])
def test_options_are_the_settings(name: str) -> None:
    made = next(option for option in OPTIONS if option.name == name)
    assert made.default == getattr(DistillationSettings(), name)
    assert f"--{name.replace('_', '-')}" in made.opts
