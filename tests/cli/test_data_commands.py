"""Commands on people's data: what is answered, left out, refused and written."""

# ruff: noqa: E501, E731 (a line for each case)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer
from typer.testing import CliRunner

import softprompt_fast as spf
from softprompt_fast.cli.app import app
from softprompt_fast.models.deep_prompt_model import DeepPromptModel
from softprompt_fast.tasks.task import Task

WORDS = {"1": " yes", "0": " no"}
BAD_TEXTS = [
    {"text": "fine film", "label": 1},
    {"text": None, "label": 0},
    {"text": "", "label": 1},
    {"text": "  ", "label": 0},
    {"text": "dull film", "label": 0},
]


@pytest.fixture(scope="module")
def prompts(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with one prompt each: a classification and a generation task, and a deep prompt."""
    tasks = {
        "tone": Task("classification", "{text} Label :", "label", WORDS, model=str(model_folder), prompt="tone"),
        "pair": Task("classification", "{title} {text} :", "label", WORDS, model=str(model_folder), prompt="pair"),
        "story": Task("generation", "{text}", "response", model=str(model_folder), prompt="story"),
    }
    tuned = spf.SoftPromptModel(build("llama"))
    folders = {}
    for name, task in tasks.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tuned.add_prompt(name, init=torch.randn(3, 32))
        tuned.save_pretrained(folders[name], [name])
        task.save(folders[name] / name)
    deep = DeepPromptModel(build("llama"))
    deep.add_prompt("deep", 3)
    folders["deep"] = tmp_path_factory.mktemp("deep")
    deep.save_pretrained(folders["deep"], ["deep"])
    tasks["tone"].save(folders["deep"] / "deep")
    return folders


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command on rows (as jsonl) or on the text of a file; gives the result, with what was printed as JSON."""

    def start(command: str, prompt: Path, data: Any, *arguments: Any, name: str = "data.jsonl", status: int = 0) -> Any:
        path = tmp_path / name
        if data is not None:
            lines = "".join(json.dumps(row) + "\n" for row in data) if isinstance(data, list) else data
            path.write_text(lines, encoding="utf-8")
        common = [command, "-p", prompt, "-d", path, "--dtype", "float32"]
        result = CliRunner().invoke(app, [str(a) for a in (*common, *arguments)])
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return start


def answers(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]


def test_rows_without_text_are_errors_of_predict(prompts: dict[str, Path], run: Run, tmp_path: Path) -> None:
    found = answers(run("predict", prompts["tone"], BAD_TEXTS, status=3))
    assert [row.get("error") for row in found] == [None, *["the text is empty"] * 3, None]
    assert {row["prediction"] for row in found if "error" not in row} <= {"0", "1"}
    found = answers(
        run("predict", prompts["pair"], [{"title": "film", "text": None}, {"title": " ", "text": None}], status=3)
    )
    assert "prediction" in found[0] and found[1]["error"] == "the text is empty"
    run("predict", prompts["tone"], BAD_TEXTS[1:3], status=1)
    run("predict", prompts["tone"], BAD_TEXTS[:1])


def test_words_that_look_like_holes_are_answered(prompts: dict[str, Path], run: Run) -> None:
    words = ["NA", "n/a", "None", "nan", "007", "1.70"]
    found = answers(run("predict", prompts["tone"], "text\n" + "\n".join(words) + "\n", name="data.csv"))
    assert [row["text"] for row in found] == words and all("prediction" in row for row in found)


def test_evaluate_leaves_out_what_cannot_be_scored(
    prompts: dict[str, Path], run: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    rows = lambda result: json.loads(result.stdout)["rows"]
    assert rows(run("evaluate", prompts["tone"], BAD_TEXTS)) == 2
    assert f"3 of 5 rows are left out: no text ({tmp_path / 'data.jsonl'}, lines 2, 3, 4)" in caplog.text
    holes = "text,label\nfine film,1\ndull film,\npoor film,0.0\n"
    assert rows(run("evaluate", prompts["tone"], holes, name="data.csv")) == 2
    assert f"1 of 3 rows are left out: no 'label' ({tmp_path / 'data.csv'}, line 3)" in caplog.text
    assert rows(run("evaluate", prompts["story"], [{"text": "film", "response": r} for r in (None, "fine", " ")])) == 1


def test_evaluate_leaves_out_what_cannot_be_read(
    prompts: dict[str, Path], run: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    texts = ["fine film", "bad \ud83d", ["fine"], {"a": 1}, "dull film"]
    result = run("evaluate", prompts["tone"], [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    assert json.loads(result.stdout)["rows"] == 2
    assert f"3 of 5 rows are left out: no readable text ({tmp_path / 'data.jsonl'}, lines 2, 3, 4: " in caplog.text


def test_a_file_without_a_header(prompts: dict[str, Path], run: Run, tmp_path: Path, model_folder: Path) -> None:
    data = "fine film,yes\ndull film,no\npoor film,no\n"
    path = tmp_path / "data.csv"
    path.write_text(data * 4)
    columns = ("--no-header", "--text-column", "1", "--label-column", "2", "--template", "{1} Label :")
    result = train(model_folder, path, tmp_path / "run", *columns)
    assert result.exit_code == 0, (result.output, result.exception)
    found = answers(run("predict", tmp_path / "run", data, "--no-header", name="data.csv"))
    assert [row["1"] for row in found] == ["fine film", "dull film", "poor film"]
    assert json.loads(run("evaluate", tmp_path / "run", data, "--no-header", name="data.csv").stdout)["rows"] == 3


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        ("", "data.jsonl", "data.jsonl holds no rows"),
        ([{"text": "film"}], "data.jsonl", "no column 'label' in the data, which has ['text']"),
        ([{"text": None, "label": 1}], "data.jsonl", "got none among 1: no text"),
        ([{"other": "x", "label": 1}], "data.jsonl", "names column 'text', but the data has ['other', 'label']"),
        ([{"text": ["a"], "label": 1}], "data.jsonl", "column 'text' must hold text, got list ['a']"),
        ([{"text": "a", "label": [1]}], "data.jsonl", "column 'label' must hold one label in each row, got list [1]"),
        ("text,label\na,b,1\n", "data.csv", "line 2 has 3"),
    ],
)
def test_what_evaluate_refuses(prompts: dict[str, Path], run: Run, data: Any, name: str, message: str) -> None:
    result = run("evaluate", prompts["tone"], data, name=name, status=1)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_the_file_is_read_as_the_options_say(prompts: dict[str, Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes("text~label\nété~1\n".encode("utf-16-be"))
    found = answers(
        run("predict", prompts["tone"], None, "--delimiter", "~", "--encoding", "utf-16-be", name="data.csv")
    )
    assert found[0]["text"] == "été"
    (tmp_path / "data.csv").write_text("text\tlabel\nx;,|\t1\n")
    assert answers(run("predict", prompts["tone"], None, "--delimiter", r"\t", name="data.csv"))[0]["label"] == "1"
    for option in ("--split", "--config"):
        result = run("predict", prompts["tone"], None, option, "x", name="data.csv", status=1)
        assert "is for datasets on the hub" in str(result.exception)


def test_columns_of_the_person_are_kept(
    prompts: dict[str, Path], run: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    rows = [{"text": "film", "prediction": "mine", "error": None}, {"text": "fine", "prediction": 2, "error": "old"}]
    output = tmp_path / "a.jsonl"
    run("predict", prompts["tone"], rows, "-o", output)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prediction"] for row in found] == ["mine", 2] and all(r["prediction_2"] in "01" for r in found)
    assert all("scores" in row for row in found) and "'prediction' as 'prediction_2'" in caplog.text
    output.write_text(output.read_text().splitlines(keepends=True)[0])
    assert "wrote 1 rows, 0 of them errors" in run("predict", prompts["tone"], rows, "-o", output, "--resume").output
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row) for row in again] == [list(row) for row in found] and again[0] == found[0]
    run("predict", prompts["tone"], None, "-o", tmp_path / "b.jsonl", name="a.jsonl")
    assert "prediction_3" in json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])
    run("predict", prompts["tone"], None, "-o", tmp_path / "b.jsonl", "--resume", name="a.jsonl")
    generated = [{"text": "film", "generated": "mine"}]
    found = answers(run("generate", prompts["story"], generated, "--max-new-tokens", "2"))
    assert found[0]["generated"] == "mine" and "generated_2" in found[0]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_resuming_after_numbers_that_are_none(prompts: dict[str, Path], run: Run, tmp_path: Path, suffix: str) -> None:
    table = pa.table({"text": ["film", "dull", "fine"], "score": [0.5, float("nan"), float("inf")]})
    pq.write_table(table, tmp_path / "data.parquet")
    output = tmp_path / f"a.{suffix}"
    common = ("predict", prompts["tone"], None, "-o", output)
    lines = tmp_path / ("a.jsonl" if suffix == "jsonl" else f"a.{suffix}.partial.jsonl")
    run("predict", prompts["tone"], None, "-o", tmp_path / "whole.jsonl", name="data.parquet")
    whole = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line, parse_constant=pytest.fail)["score"] for line in whole] == [0.5, None, "Infinity"]
    lines.write_text(whole[0] + whole[1] + whole[2][:9])
    run(*common, "--resume", name="data.parquet")
    if suffix == "parquet":
        found = pq.read_table(output).column("score")
        assert found.type == pa.float64() and str(found.to_pylist()) == "[0.5, nan, inf]"
    else:
        assert output.read_text().count("\n") == 3 + (suffix == "csv")


def test_errors_of_an_earlier_run_are_not_counted(prompts: dict[str, Path], run: Run, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    run("predict", prompts["tone"], BAD_TEXTS, "-o", output, status=3)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:4]))
    assert (
        "wrote 1 rows, 0 of them errors" in run("predict", prompts["tone"], BAD_TEXTS, "-o", output, "--resume").output
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_finished_file_is_resumed_for_its_own_rows_only(
    prompts: dict[str, Path], run: Run, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / "new" / f"a.{suffix}"
    rows = [{"text": "film", "number": 1}, {"text": " bad \ud83d", "number": None}]
    run("predict", prompts["tone"], rows, "-o", output, status=3)
    assert "wrote 0 rows" in run("predict", prompts["tone"], rows, "-o", output, "--resume").output
    for other in ([*rows, rows[0]], [{"text": "other", "number": 1}, rows[1]]):
        result = run("predict", prompts["tone"], other, "-o", output, "--resume", status=1)
        assert "is finished and holds answers to other rows" in str(result.exception)


def test_resuming_a_broken_file_names_its_line(prompts: dict[str, Path], run: Run, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    run("predict", prompts["tone"], BAD_TEXTS, "-o", output, status=3)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"\x00" * 9 + b"\n")
    result = run("predict", prompts["tone"], BAD_TEXTS, "-o", output, "--resume", status=1)
    assert f"cannot resume: {output}, line 2 is not JSON" in str(result.exception)


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("data.jsonl", ("--resume",), "`output` must be another file than the one of the rows"),
        ("link.jsonl", ("--resume",), "`output` must be another file than the one of the rows"),
        ("a.txt", (), "`output` must end in .jsonl, .csv, .parquet"),
        ("there.csv", (), "already holds answers; resume, or choose another file"),
        ("data.jsonl/a.jsonl", (), "must be in a folder"),
        ("-", (), "`output` must end in .jsonl, .csv, .parquet"),
        (None, ("--resume",), "--resume cannot be used without --output"),
    ],
)
def test_outputs_that_are_refused_before_any_work(
    run: Run, tmp_path: Path, output: str | None, more: tuple[str, ...], message: str
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "film"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    (tmp_path / "there.csv").write_text("text\n")
    target = () if output is None else ("-o", tmp_path / output)
    for command in ("predict", "generate"):
        result = run(command, tmp_path / "no prompt", None, *target, *more, status=1)
        assert message in str(result.exception)
    assert (tmp_path / "data.jsonl").read_text() == '{"text": "film"}\n'


def test_ray_refuses_deep_prompts_before_any_work(prompts: dict[str, Path], run: Run, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    rows = [{"text": "film"}]
    result = run("predict", prompts["deep"], rows, "--engine", "ray", "-o", tmp_path / "a.jsonl", status=1)
    assert str(result.exception) == "--engine ray cannot be combined with deep prompts, got deep"
    assert "prediction" in answers(run("predict", prompts["deep"], rows))[0]


def train(model: Path, data: Path, output: Path, *arguments: str) -> Any:
    shutil.rmtree(output, ignore_errors=True)
    words = ["--steps", "2", "--batch-size", "4", "--virtual-tokens", "2", "--held-out", "2", "--dtype", "float32"]
    return CliRunner().invoke(app, ["train", "-m", str(model), "-d", str(data), "-o", str(output), *words, *arguments])


def test_train_leaves_out_rows_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data = tmp_path / "model", tmp_path / "data.csv"
    build("llama").save_pretrained(model)
    tiny_tokenizer("None", "Support").save_pretrained(model)
    lines = [f"{row['text']},{('None', 'Support')[i % 2]}" for i, row in enumerate(reviews(12))]
    data.write_text("text,label\n" + "\n".join([*lines, ",None", "film,"]) + "\n")
    result = train(model, data, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert f"2 of 14 rows are left out: no text ({data}, line 14); no 'label' ({data}, line 15)" in caplog.text
    assert Task.load(tmp_path / "run").label_words == {"None": " None", "Support": " Support"}


A_AND_B = ("--label-word", "a=yes", "--label-word", "b=no")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "x", "label": ["joy", "anger"]}, (), "data.jsonl, line 1: column 'label' must hold one label in each row"),
        ({"text": "x", "label": {"name": "a"}}, (), "got dict {'name': 'a'}"),
        ({"text": "x", "label": "a"}, ("--template", "{text} {label} :"), "must not name the column of the answer"),
        ({"text": "x", "label": "a"}, ("--template", '{text} {"a": 1}', *A_AND_B), "braces around other text are doubled"),
        ({"text": ["x"], "label": "a"}, A_AND_B, "column 'text' must hold text, got list"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ("--task", "generation"), "whose tokenizer has a chat template"),
        ({"prompt": ["a"], "response": "b"}, ("--task", "generation"), "column 'prompt' must hold text, got list"),
        ({"prompt": "a", "response": {"x": 1}}, ("--task", "generation"), "column 'response' must hold text, got dict"),
    ],
)  # fmt: skip
def test_what_train_refuses(
    model_folder: Path, tmp_path: Path, row: Any, options: tuple[str, ...], message: str
) -> None:
    data = tmp_path / "data.jsonl"
    other = row | ({"label": "b"} if row.get("label") == "a" else {})
    data.write_text("".join(json.dumps(one) + "\n" for one in [row, other] * 6))
    result = train(model_folder, data, tmp_path / "run", *options)
    assert result.exit_code == 1 and message in str(result.exception), result.exception


def test_train_on_columns_of_any_name(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    column = "review.text[0]:{a}!"
    data.write_text("".join(json.dumps({column: r["text"], "label": r["label"] == "yes"}) + "\n" for r in reviews(12)))
    words = ("--label-word", "true=yes", "--label-word", "false=no")
    result = train(model_folder, data, tmp_path / "run", "--text-column", column, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    common = ["evaluate", "-p", str(tmp_path / "run"), "-d", str(data), "--dtype", "float32"]
    assert json.loads(CliRunner().invoke(app, common).stdout)["rows"] == 12


def test_train_and_predict_on_conversations(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} : {% endfor %}"
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    build("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)
    turns = lambda question, answer: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    data.write_text("".join(json.dumps({"messages": turns(r["text"], r["label"])}) + "\n" for r in reviews(12)))
    result = train(model, data, tmp_path / "run", "--task", "generation")
    assert result.exit_code == 0, (result.output, result.exception)
    task = Task.load(tmp_path / "run")
    assert task.text({"messages": turns("fine film", "yes")}) == "fine film : " and task.columns == ["messages"]
    common = ["-d", str(data), "--dtype", "float32"]
    found = answers(CliRunner().invoke(app, ["predict", "-p", str(tmp_path / "run"), *common, "--max-new-tokens", "2"]))
    assert len(found) == 12 and all("prediction" in row and "messages" in row for row in found)
    chat = [*common, "--task", "generation", "-m", str(model)]
    result = CliRunner().invoke(app, ["similar", "-p", str(tmp_path / "run"), *chat])
    assert result.exit_code == 0, (result.output, result.exception)
    output = str(tmp_path / "compared")
    result = CliRunner().invoke(app, ["compare", *chat, "-o", output, "--methods", "zero-shot", "--threads", "1"])
    assert result.exit_code == 0, (result.output, result.exception)


def test_names_of_prompts_are_refused_by_their_option(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row | {"task": "v 1"}) + "\n" for row in reviews(12)))
    result = train(model_folder, data, tmp_path / "run", "--name", "v1.0")
    assert str(result.exception).startswith("--name must be 1 to 128 letters, digits")
    result = train(model_folder, data, tmp_path / "run", "--task-column", "task")
    assert str(result.exception).startswith("a task of column 'task' must be 1 to 128 letters, digits")
