"""lm-evaluation-harness with a soft prompt gives the numbers of the pipeline and of the command ``evaluate``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_reviews import reviews, run

import softprompt_fast as spf
from softprompt_fast.hf import load_base_model
from softprompt_fast.inference import SoftPromptPipeline

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
CONTEXTS = ["a good film", "a bad and very long film that nobody likes", "good"]
CONTINUATIONS = [" good", " a bad film", " bad"]


@pytest.fixture(scope="module", params=["plain", "deep"])
def folders(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, tokenizer = load_base_model(str(model_folder), "float32", "cpu")
    tuned = (spf.DeepPromptModel if request.param == "deep" else spf.SoftPromptModel)(base)
    torch.manual_seed(0)
    tuned.add_prompt("p", init=torch.randn(5, tuned.prompts.embedding_dim) * 0.5)
    folder = tmp_path_factory.mktemp("prompt")
    tuned.save_pretrained(folder)
    return model_folder, folder / "p", SoftPromptPipeline(tuned, tokenizer)


def harness(model: Path, prompt: Path, **options: Any) -> Any:
    from softprompt_fast.interop.lm_eval import SoftPromptLM

    return SoftPromptLM(str(model), prompt, dtype="float32", device="cpu", **options)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_equal_the_pipelines(folders: Any, batch_size: int) -> None:
    model, prompt, pipeline = folders
    lm = harness(model, prompt, batch_size=batch_size)
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = pipeline.score(CONTEXTS, CONTINUATIONS, "p")
    for (value, _), wanted in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted["log_probability"], rel=1e-5)


def test_generated_texts_equal_the_pipelines(folders: Any) -> None:
    model, prompt, pipeline = folders
    lm = harness(model, prompt, batch_size=3)
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    found = lm.generate_until(requests("generate_until", [(text, options) for text in CONTEXTS]), disable_tqdm=True)
    expected = pipeline.generate(CONTEXTS, "p", max_new_tokens=6, do_sample=False)
    assert [text.strip() for text in found] == [each["text"].strip() for each in expected]


def test_the_prompt_counts_in_the_context(folders: Any) -> None:
    model, prompt, _ = folders
    assert (
        harness(model, prompt).max_length
        == json.loads((model / "config.json").read_text())["max_position_embeddings"] - 5
    )


def local_task(folder: Path, rows: list[dict[str, Any]], **options: str) -> Path:
    """A file of rows, and a task of the harness that reads it."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = "".join(f"{key}: {value}\n" for key, value in options.items())
    (folder / "task.yaml").write_text(
        "task: local_sentiment\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\noutput_type: multiple_choice\n"
        f"{given}target_delimiter: ' '\nmetric_list:\n  - metric: acc\n"
    )
    return data


def test_a_task_of_local_files(folders: Any, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    model, prompt, pipeline = folders
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(CONTEXTS * 4)]
    local_task(tmp_path, rows, doc_to_text="'{{text}}'", doc_to_target="label", doc_to_choice="['bad', 'good']")
    found = lm_eval.simple_evaluate(
        model=harness(model, prompt, batch_size=4),
        tasks=["local_sentiment"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    right = 0
    for row in rows:
        scores = [pipeline.score([row["text"]], [word], "p")[0]["log_probability"] for word in (" bad", " good")]
        right += int(scores[1] > scores[0]) == row["label"]
    assert found["results"]["local_sentiment"]["acc,none"] == pytest.approx(right / len(rows))


def test_the_command_gives_the_accuracy_of_evaluate(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of labels with several tokens the harness sums all, and `evaluate` compares those that differ: so one each."""
    model, prompt, _ = folders
    answers = {"no": 0, "yes": 1}
    rows = [row | {"label": answers[row["label"]]} for row in reviews(24)]
    choices = "['no', 'yes']"
    task = {"doc_to_text": '"{{text}}\\nLabel :"', "doc_to_target": "label", "doc_to_choice": choices}
    data = local_task(tmp_path, rows, **task)
    options = ["--model", str(model), "--prompt", str(prompt), "--dtype", "float32"]
    words = ["--template", r"{text}\nLabel :", "--label-word", "0= no", "--label-word", "1= yes"]
    expected = json.loads(run("evaluate", *options, "--data", str(data), *words).stdout)
    arguments = ["--model", "softprompt", "--model_args", f"pretrained={model},prompt={prompt},dtype=float32"]
    arguments += ["--tasks", "local_sentiment", "--include_path", str(tmp_path), "--batch_size", "5"]
    arguments += ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    command = next(iter(entry_points(group="console_scripts", name="softprompt-lm-eval")), None)
    monkeypatch.setattr(sys, "argv", ["softprompt-lm-eval", *arguments])
    if command is None:  # the package was installed before it had this command
        from softprompt_fast.interop.lm_eval import main as started
    else:
        started = command.load()
    started()
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert found["results"]["local_sentiment"]["acc,none"] == pytest.approx(expected["accuracy"])
    assert 0 < expected["accuracy"] < 1
