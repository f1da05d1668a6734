"""Comparisons end to end: settings, jobs in processes, the command line, what is written."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison_cases import ANSWERS, SPLITS, TASK, job_of, result
from support.tiny_models import build
from support.tiny_reviews import run, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.base.files import read_json, size_of, write_json
from softprompt_fast.comparison import pool, worker
from softprompt_fast.comparison.result import Comparison, ComparisonSetup
from softprompt_fast.comparison.run import compare, write_files
from softprompt_fast.comparison.settings import METHODS, Job, parse_options
from softprompt_fast.comparison.splits import clean_splits
from softprompt_fast.comparison.summary import summarise
from softprompt_fast.comparison.verdict import verdict
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.tuning.settings import TuningSettings

# --- settings ---


def test_options_are_checked_before_anything_runs(tmp_path: Path) -> None:
    assert parse_options(["lora.r=4", "prompt.init=text", 'lora.target_modules=["q_proj"]']) == {
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "prompt": {"init": "text"},
    }
    with pytest.raises(ValueError, match=r"METHOD\.OPTION=VALUE, got 'lora=4'"):
        parse_options(["lora=4"])

    def start(**changes: Any) -> Comparison:
        return compare("nowhere", TASK, SPLITS["train"], SPLITS["validation"], SPLITS["test"], tmp_path, **changes)

    for message, changes in (
        ("`methods` must be some of .* got magic", {"methods": ["magic"]}),
        ("`methods` must be some of .* got magic", {"options": {"magic": {}}}),
        ("`options` of 'lora' must be some of r, alpha, .* got 'rank'", {"options": {"lora": {"rank": 3}}}),
        ("`learning_rate` must be positive and finite", {"options": {"prompt": {"learning_rate": -1.0}}}),
        ("`init` of 'peft-prompt' must be one of RANDOM, .* got 'x'", {"options": {"peft-prompt": {"init": "x"}}}),
        ("`seeds` must hold at least one", {"seeds": []}),
        ("`steps` must be positive, got 0", {"steps": 0}),
        (
            "`options` must name methods that are compared, got lora",
            {"methods": ["prompt"], "options": {"lora": {"r": 2}}},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            start(**changes)
    with pytest.raises(ValueError, match="`test` must hold rows, got none"):
        compare("nowhere", TASK, SPLITS["train"], SPLITS["validation"], [], tmp_path)
    assert not (tmp_path / "runs").exists()


def test_texts_of_the_test_rows_leave_the_other_splits() -> None:
    test = SPLITS["test"][:5]
    other = SPLITS["validation"][:5]
    empty = {"text": "", "label": "yes"}
    splits, left = clean_splits(TASK, SPLITS["train"] + test[:2] + other[:1], [*other, test[4]], [*test, empty])
    assert (splits["train"], splits["validation"], splits["test"]) == (SPLITS["train"], other, test)
    assert sorted(left.values()) == [1, 1, 3]
    with pytest.raises(ValueError, match="`train` must hold texts that are not in"):
        clean_splits(TASK, test, other, test)


def test_a_job_is_known_by_its_settings_and_data(tmp_path: Path) -> None:
    job = job_of("lora", tmp_path)
    assert job.key() == replace(job, result="elsewhere", data="there", artifacts="here", threads=3).key()
    for change in ({"data_digest": "x"}, {"seed": 1}, {"options": {**job.options, "r": 4}}, {"model_digest": "y"}):
        assert replace(job, **change).key() != job.key()
    prompt = job_of("prompt", tmp_path)
    usual = TuningSettings().learning_rate  # a default that changes makes another job
    bare = {name: value for name, value in prompt.options.items() if name != "learning_rate"}
    given = [replace(prompt, options=bare | {"learning_rate": rate}).key() for rate in (usual, usual / 2)]
    assert given[0] == replace(prompt, options=bare).key() != given[1]


# --- jobs in processes ---


def fake_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(pool, "WORKER", ["-c", code])


def test_a_process_that_dies_is_recorded_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import json, os, signal, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        "print('last words', flush=True)\n"
        "if job['seed'] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if job['seed'] == 1: sys.exit(3)\n"
        "if job['seed'] == 2: import time; time.sleep(60)\n"
        "open(job['result'], 'w').write(json.dumps({'key': job['data_digest'], 'status': 'ok', 'seed': 3}))\n"
    )
    fake_worker(monkeypatch, code)
    jobs = [job_of("lora", tmp_path, seed=seed) for seed in range(4)]
    monkeypatch.setattr(Job, "key", lambda self: self.data_digest)
    (tmp_path / "runs").mkdir()
    results = pool.run_jobs(jobs, tmp_path, at_once=2, timeout=3.0)
    assert "signal 9 (SIGKILL); the machine may be out of memory: last words" in results[0]["reason"]
    assert "ended with status 3 and no result: last words" in results[1]["reason"]
    assert "took longer than 3 s" in results[2]["reason"]
    assert [r["status"] for r in results] == ["error"] * 3 + ["ok"]
    assert all(read_json(Path(job.result)) is not None for job in jobs)


def test_an_interrupted_comparison_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, os, subprocess, sys, time\n"
        "job = json.load(open(sys.argv[1]))\n"
        "if job['seed'] == 1:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    open(job['data'] + '.pids', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(job['data'] + '.pids') or not open(job['data'] + '.pids').read():\n"
        "    time.sleep(0.02)\n"
    )
    fake_worker(monkeypatch, code)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    jobs = [job_of("lora", tmp_path, seed=seed) for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        pool.run_jobs(jobs, tmp_path, at_once=2, on_result=interrupt)
    parent, child = map(int, Path(f"{tmp_path / 'data'}.pids").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(parent, 0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def compared(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Runs the command line on the same data and folder."""
    folder = tmp_path_factory.mktemp("compare")
    for name, rows in SPLITS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(*more: str) -> tuple[Path, Any]:
        files = ["--data", folder / "train.jsonl", "--validation", folder / "validation.jsonl"]
        files += ["--test", folder / "test.jsonl", "--output", folder / "out"]
        command = [
            "compare",
            "--model",
            model_folder,
            *files,
            "--dtype",
            "float32",
            "--steps",
            "4",
            "-b",
            "8",
            "-P",
            "4",
        ]
        return folder / "out", run(*map(str, command), *more)

    return start


METHODS_RUN = ["zero-shot", "prompt", "lora"]


def test_the_command_line_compares_records_failures_and_resumes(compared: Callable[..., tuple[Path, Any]]) -> None:
    command = ["--methods", ",".join(METHODS_RUN), "--set", "lora.target_modules=NONSENSE", "--name", "films & <plots>"]
    out, shown = compared(*command)
    assert "[3/3] lora, seed 0: error: " in shown.output and "Target modules NONSENSE" in shown.output
    found = json.loads((out / "results.json").read_text())
    methods = {method["method"]: method for method in found["methods"]}
    assert methods["lora"]["status"] == "failed" and "NONSENSE" in methods["lora"]["reasons"][0]
    assert found["rows"] == {"train": 100, "validation": 40, "test": 60} and found["seeds"] == [0]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    stored = json.loads((out / "runs" / "prompt-seed0.json").read_text())
    assert sum(stored["rows"]["correct"]) / 60 == methods["prompt"]["score"]
    truth = [row["label"] for row in SPLITS["test"]]
    hits = [int(a == b) for a, b in zip(stored["rows"]["predicted"], truth, strict=True)]
    assert hits == stored["rows"]["correct"]
    again = evaluate(
        spf.SoftPromptModel.from_pretrained(build("llama"), out / "artifacts" / "prompt-seed0"),
        tiny_tokenizer(),
        replace(TASK, prompt="prompt"),
        SPLITS["test"],
    )
    assert (again["accuracy"], again["loss"]) == pytest.approx((methods["prompt"]["score"], methods["prompt"]["loss"]))
    assert stored["processor_seconds"] > 0 < stored["inference_processor_seconds"]
    assert stored["memory_training"] > 50e6 and stored["inference_seconds"] > 0 and stored["prefix_tokens"] == 4
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == METHODS_RUN and {line["data"] for line in lines} == {"films & <plots>"}
    assert float(lines[1]["score"]) == methods["prompt"]["score"] and lines[2]["score"] == ""
    page = (out / "report.html").read_text()
    assert all(method in page for method in METHODS_RUN) and "films &amp; &lt;plots&gt;" in page
    assert "http" not in page and "<script" not in page and "src=" not in page and page.count("<svg") == 2
    assert "NONSENSE" in page and found["verdict"].split(":")[0] in page

    times = {file.name: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    compared(*command)
    later = {file.name: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert {name for name in times if times[name] != later[name]} == {"lora-seed0.json"}


def test_a_worker_reports_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_fast.hf.loading.load_base_model", lambda *_: (build("llama"), tiny_tokenizer()))
    write = tmp_path / "data"
    write.mkdir()
    for name, rows in SPLITS.items():
        (write / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_of("linear-probe", tmp_path)
    write_json(tmp_path / "job.json", asdict(job))
    monkeypatch.setattr(worker, "_die_with_parent", lambda: None)
    assert worker.main(str(tmp_path / "job.json")) == 0
    found = read_json(Path(job.result))
    assert found is not None and found["status"] == "ok" and found["key"] == job.key() == found["key"]
    assert found["stored_bytes"] == size_of(Path(job.artifacts)) and len(found["rows"]["losses"]) == 60
    assert found["summary"]["accuracy"] == sum(found["rows"]["correct"]) / 60
    job = job_of("linear-probe", tmp_path, ANSWERS)
    write_json(tmp_path / "job.json", asdict(job))
    assert worker.main(str(tmp_path / "job.json")) == 0
    found = read_json(Path(job.result))
    assert found is not None and found["status"] == "not applicable"
    monkeypatch.setattr("softprompt_fast.hf.loading.load_base_model", lambda *_: (build("t5"), tiny_tokenizer()))
    assert worker.main(str(tmp_path / "job.json")) == 1
    found = read_json(Path(job.result))
    assert found is not None and "must be a decoder, got T5" in found["reason"]


def test_every_method_is_in_the_report_even_without_a_result(tmp_path: Path) -> None:
    truth = ["yes"] * 30
    every = [result(m, 0, [1] * (20 + i) + [0] * (10 - i), detail={}) for i, m in enumerate(METHODS)]
    every[-1] = {"method": "full", "seed": 0, "status": "error", "reason": "<out> of memory", "options": {}}
    setup = ComparisonSetup(
        data="rows",
        model="tiny",
        metric="accuracy",
        rows={"train": 1, "validation": 1, "test": 30},
        left_out={},
        labels={name: {"yes": 1} for name in ("train", "validation", "test")},
        seeds=[0],
        steps=1,
        batch_size=1,
        task=TASK,
        jobs_at_once=2,
    )
    summaries = summarise(every, METHODS, truth)
    write_files(Comparison(tmp_path, setup, summaries, every, verdict(summaries, "classification")))
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{method}</td>" in page for method in METHODS)
    assert "&lt;out&gt; of memory" in page and "http" not in page
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == len(METHODS)
    assert header == (
        "data,model,method,status,metric,score,score_sd,score_low,score_high,interval,loss,loss_low,loss_high,macro_f1,"
        "difference,p,p_holm,test,seeds,train_rows,validation_rows,test_rows,trainable_parameters,stored_bytes,"
        "prefix_tokens,text_tokens,train_seconds,evaluation_seconds,inference_seconds_per_1000,flops_per_row,"
        "flops_per_row_cached,memory_loaded,memory_training,memory_inference,reason"
    )
    assert list(json.loads((tmp_path / "results.json").read_text())) == [
        *("data", "model", "metric", "rows", "left_out", "labels", "seeds", "steps", "batch_size", "task", "dtype"),
        *("jobs_at_once", "threads", "model_facts", "environment", "same_environment"),
        *("verdict", "rules", "methods", "jobs"),
    ]
