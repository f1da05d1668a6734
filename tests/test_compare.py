"""Ways to use a model compared: each method, the statistics, jobs in processes, what is written."""

from __future__ import annotations

import csv
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from test_tuning import model_folder  # noqa: F401 - a fixture
from tiny_models import build
from tiny_reviews import BAD, GOOD, reviews, run, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.task import Task, classification_task, generation_task
from softprompt_fast.tuning import evaluate
from softprompt_fast.tuning.compare import METHODS, compare, parse_options, pool, worker
from softprompt_fast.tuning.compare.backends import Packed, PeftPrompt, Plain
from softprompt_fast.tuning.compare.cost import cost, matrix_weights
from softprompt_fast.tuning.compare.encoding import Encoder, draw_shots, fitting_shots
from softprompt_fast.tuning.compare.files import clean_splits, read_json, size_of, write_json
from softprompt_fast.tuning.compare.loop import grouped_batches, schedule_at
from softprompt_fast.tuning.compare.memory import PeakMemory
from softprompt_fast.tuning.compare.methods import RUNNERS, NotApplicable, Work
from softprompt_fast.tuning.compare.run import Comparison, write_files
from softprompt_fast.tuning.compare.scores import score_rows
from softprompt_fast.tuning.compare.settings import Job, resolve_options
from softprompt_fast.tuning.compare.summary import MethodSummary, summarise
from softprompt_fast.tuning.compare.verdict import verdict
from softprompt_fast.tuning.scoring import score_prompts
from softprompt_fast.tuning.statistics import bootstrap_interval, holm, mcnemar, paired_permutation

TASK = classification_task(reviews())
ANSWERS = generation_task(prompt_column="text", response_column="label")
LONG_WORDS = Task("classification", "{text}", "label", {"yes": " very fine", "no": " dull"})


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Different texts; one telling word somewhere in each decides its label."""
    generator = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        label = len(rows) % 2
        words = [generator.choice(["film", "plot", "very"]) for _ in range(generator.randint(2, 9))]
        words.insert(generator.randrange(len(words)), generator.choice((BAD, GOOD)[label]))
        rows.setdefault(" ".join(words), {"text": " ".join(words), "label": ("no", "yes")[label]})
    return list(rows.values())


ROWS = sentences(200, 0)
SPLITS = {"train": ROWS[:100], "validation": ROWS[100:140], "test": ROWS[140:]}
FAST: dict[str, dict[str, Any]] = {
    "prompt": {"learning_rate": 0.3},
    "peft-prompt": {"learning_rate": 0.3},
    "lora": {"learning_rate": 1e-2},
    "full": {"learning_rate": 3e-3},
}


def job_of(method: str, folder: Path, task: Task = TASK, *, steps: int = 40, seed: int = 0, **options: Any) -> Job:
    given = FAST.get(method, {}) | options
    own = resolve_options(method, given, task=task, steps=steps, virtual_tokens=4, instruction=None)
    name = f"{method}-seed{seed}"
    return Job(
        method=method,
        seed=seed,
        model="tiny",
        dtype="float32",
        device="cpu",
        threads=None,
        task=asdict(task),
        options=own,
        batch_size=16,
        data=str(folder / "data"),
        data_digest="",
        model_digest="",
        result=str(folder / "runs" / f"{name}.json"),
        artifacts=str(folder / "artifacts" / name),
    )


def work_of(method: str, folder: Path, task: Task = TASK, **options: Any) -> Work:
    return Work(job_of(method, folder, task, **options), replace(task), build("llama"), tiny_tokenizer(), SPLITS)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()}


# --- methods ---


def test_methods_without_training_score_what_they_say(tmp_path: Path) -> None:
    """Against the library's own scores of the same texts, put together by hand."""
    for method, front in (("zero-shot", ""), ("instruction", "very very film\n")):
        options = {"instruction": front} if front else {}
        work = work_of(method, tmp_path, **options)
        ready = RUNNERS[method](work)
        rows = [row | {"text": front + row["text"]} for row in SPLITS["test"]]
        expected = evaluate(spf.SoftPromptModel(build("llama")), tiny_tokenizer(), TASK, rows)
        scores = ready.score(SPLITS["test"])
        assert scores.loss == pytest.approx(expected["loss"], abs=1e-5) and scores.accuracy == expected["accuracy"]
        assert ready.prefix_tokens == len(front.split()) and ready.stored_bytes == len(front)
        assert ready.trainable_parameters == 0 and ready.train_seconds == 0


@pytest.mark.parametrize("method", ["prompt", "peft-prompt", "lora", "full", "linear-probe"])
def test_trained_methods_learn_and_keep_their_best(method: str, tmp_path: Path) -> None:
    work = work_of(method, tmp_path, steps=100 if "prompt" in method else 40)
    before = weights_of(work.model)
    ready = RUNNERS[method](work)
    bare = evaluate(spf.SoftPromptModel(build("llama")), tiny_tokenizer(), TASK, SPLITS["test"])
    scores = ready.score(SPLITS["test"])
    assert scores.accuracy is not None
    assert scores.loss < bare["loss"] or method == "linear-probe"
    assert scores.accuracy >= (0.95 if method in ("lora", "full") else 0.6), scores.accuracy
    history = ready.detail["validation"]
    best = min(history, key=lambda facts: facts["loss"])
    again = ready.score(SPLITS["validation"])
    assert (again.accuracy, again.loss) == pytest.approx((best["accuracy"], best["loss"]), abs=1e-4)
    assert ready.train_seconds > 0 and ready.evaluation_seconds > 0
    after = weights_of(work.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "full":
        assert changed == set(before)
        assert ready.trainable_parameters == sum(p.numel() for p in build("llama").parameters())
        assert ready.stored_bytes == 4 * ready.trainable_parameters and not Path(work.job.artifacts).exists()
    else:
        assert not changed
        assert ready.stored_bytes <= size_of(Path(work.job.artifacts))
    sizes = {"prompt": 4 * 32, "peft-prompt": 4 * 32, "linear-probe": 32 + 1}
    assert ready.trainable_parameters == sizes.get(method, ready.trainable_parameters)
    assert ready.prefix_tokens == (4 if "prompt" in method else 0)
    if method == "lora":
        adapters = {name: p for name, p in work.model.named_parameters() if "lora_B" in name}
        assert adapters and all(bool(p.any()) and p.dtype == torch.float32 for p in adapters.values())
        expected = sum(8 * (m.in_features + m.out_features) for m in _linear_layers(build("llama")))
        assert ready.trainable_parameters == expected


def _linear_layers(model: Any) -> list[torch.nn.Linear]:
    return [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def test_full_fine_tuning_of_a_half_precision_model_keeps_master_weights(tmp_path: Path) -> None:
    work = work_of("full", tmp_path, steps=5, learning_rate=1e-5)
    work.model.to(torch.bfloat16)
    work.model.is_quantized = True  # as one de-quantised from a file says
    small = work.model.model.norm.weight  # 1.0: an update of 1e-5 is lost in bfloat16
    seen: list[torch.Tensor] = []
    handle = small.register_hook(lambda gradient: seen.append(small.detach().clone()))
    ready = RUNNERS["full"](work)
    handle.remove()
    assert work.model.dtype == torch.bfloat16 and ready.stored_bytes == 2 * ready.trainable_parameters
    assert seen and seen[-1].dtype == torch.float32 and 0 < (seen[-1] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear-probe"])
def test_generation_tasks(method: str, tmp_path: Path) -> None:
    ready = RUNNERS[method](work_of(method, tmp_path, ANSWERS, steps=10))
    scores = ready.score(SPLITS["test"])
    bare = score_prompts(spf.SoftPromptModel(build("llama")), tiny_tokenizer(), ANSWERS, SPLITS["test"], {"": None})[""]
    assert scores.accuracy is None and torch.equal(scores.weights, bare.weights) and scores.weights[0] == 2
    if method == "zero-shot":
        assert scores.loss == pytest.approx(bare.loss, abs=1e-5)
    elif method not in ("instruction", "few-shot"):
        assert scores.loss < bare.loss


def test_a_probe_gives_no_text(tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match="labels, not text"):
        RUNNERS["linear-probe"](work_of("linear-probe", tmp_path, ANSWERS))


def test_the_probe_reads_the_last_state_and_chooses_c_on_validation_rows(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    model, tokenizer = build("llama"), tiny_tokenizer()

    def states(rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
        found = []
        for row in rows:
            ids = torch.tensor([tokenizer(TASK.text(row)).input_ids])
            with torch.no_grad():
                found.append(model.model(ids).last_hidden_state[0, -1].numpy())
        return np.stack(found)

    train, test = states(SPLITS["train"]), states(SPLITS["test"])
    scaler = StandardScaler().fit(train)
    labels = [row["label"] for row in SPLITS["train"]]
    expected = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(train), labels)
    ready = RUNNERS["linear-probe"](work_of("linear-probe", tmp_path, C=[0.1]))
    scores = ready.score(SPLITS["test"])
    assert scores.predicted is not None
    assert [TASK.labels[i] for i in scores.predicted] == list(expected.predict(scaler.transform(test)))
    found = RUNNERS["linear-probe"](work_of("linear-probe", tmp_path, C=[1e-6, 1.0])).detail
    best = min(found["validation"], key=lambda facts: facts["loss"])
    assert found["C"] == best["C"]


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="try a smaller learning rate"):
        RUNNERS["full"](work_of("full", tmp_path, learning_rate=1e30))


# --- few shots ---


def test_shots_are_balanced_training_rows_drawn_by_the_seed(tmp_path: Path) -> None:
    shots = draw_shots(TASK, SPLITS["train"], 8, 0)
    assert Counter(row["label"] for row in shots) == {"yes": 4, "no": 4}
    assert all(row in SPLITS["train"] for row in shots)
    assert shots == draw_shots(TASK, SPLITS["train"], 8, 0) != draw_shots(TASK, SPLITS["train"], 8, 1)
    assert Counter(row["label"] for row in draw_shots(TASK, SPLITS["train"], 7, 0)).most_common()[0][1] == 4
    few = [row for row in SPLITS["train"] if row["label"] == "no"] + SPLITS["train"][1:2]
    assert Counter(row["label"] for row in draw_shots(TASK, few, 8, 0)) == {"no": 7, "yes": 1}
    ready = RUNNERS["few-shot"](work_of("few-shot", tmp_path))
    text = ready.detail["text in front"]
    assert text.startswith("Decide whether the following text is no or yes.\n") and ready.detail["shots"] == 8
    shown = [block.removesuffix("\nLabel:") for block in text.partition(".\n")[2].replace(" yes", "").split("\n\n")]
    assert len(shown) == 9
    lines = {line for block in text.split("\n\n") for line in block.split("\n")}
    assert not lines & {row["text"] for split in ("test", "validation") for row in SPLITS[split]}
    assert len(lines & {row["text"] for row in SPLITS["train"]}) == 8
    assert ready.stored_bytes == len(text.encode()) and ready.prefix_tokens == len(tiny_tokenizer()(text).input_ids)


def test_as_many_shots_as_fit() -> None:
    tokenizer, train = tiny_tokenizer(), SPLITS["train"]
    text, shots = fitting_shots(TASK, tokenizer, "very\n", train, 8, 0, "\n\n", 60)
    assert 2 <= len(shots) < 8 and len(tokenizer(text).input_ids) <= 60
    more = draw_shots(TASK, train, len(shots) + 1, 0)
    assert len(tokenizer("".join(TASK.text(r) + TASK.target(r) for r in more)).input_ids) + 1 > 60
    assert fitting_shots(TASK, tokenizer, "", train, 8, 0, "\n", None)[1] == draw_shots(TASK, train, 8, 0)
    short = replace(TASK, max_length=7)
    assert all(
        len(tokenizer(TASK.text(r)).input_ids) <= 7
        for r in fitting_shots(short, tokenizer, "", train, 8, 0, "", None)[1]
    )
    with pytest.raises(ValueError, match="no training row fits into the 3 tokens"):
        fitting_shots(TASK, tokenizer, "", train, 8, 0, "\n", 3)


def test_what_stands_in_front_does_not_shorten_the_text() -> None:
    tokenizer = tiny_tokenizer()
    row = {"text": "film " * 30 + "fine", "label": "yes"}
    task = replace(TASK, max_length=10)
    alone = Encoder(task, tokenizer).text(row)
    behind = Encoder(task, tokenizer, "very dull\n").text(row)
    assert len(alone) == 10 and behind == tokenizer("very dull").input_ids + alone
    braces = Encoder(replace(TASK, max_length=50), tokenizer, "{very}\n").text(SPLITS["test"][0])
    assert braces[-3:] == Encoder(TASK, tokenizer).text(SPLITS["test"][0])[-3:]


# --- backends ---


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("task", [TASK, ANSWERS, LONG_WORDS], ids=["one-token", "generation", "several-tokens"])
def test_backends_give_the_same_scores(architecture: str, task: Task) -> None:
    """Packed, padded on the left, and PEFT's forward call with the same prompt."""
    tokenizer, rows = tiny_tokenizer(), SPLITS["test"][:9]
    encoder = Encoder(task, tokenizer)
    plain = score_rows(Plain(build(architecture), tokenizer), encoder, rows, 4)
    packed = score_rows(Packed(spf.SoftPromptModel(build(architecture)), tokenizer), encoder, rows, 4)
    torch.testing.assert_close(plain.losses, packed.losses, atol=1e-4, rtol=1e-4)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft = get_peft_model(build(architecture), config)
    values = peft.get_prompt_embedding_to_save("default")
    tuned = spf.SoftPromptModel(build(architecture))
    tuned.add_prompt("p", init=values.clone())
    theirs = score_rows(PeftPrompt(peft.eval(), tokenizer, 3), encoder, rows, 4)
    ours = score_rows(Packed(tuned, tokenizer, "p"), encoder, rows, 4)
    torch.testing.assert_close(theirs.losses, ours.losses, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours.losses, packed.losses, atol=1e-3)


def test_training_logits_stand_where_the_targets_are() -> None:
    tokenizer = tiny_tokenizer()
    model = build("llama")
    texts, targets = [[4, 10, 7], [5, 6]], [[9, 8], [11]]
    peft = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for backend, front in ((Plain(model, tokenizer), None), (PeftPrompt(peft, tokenizer, 2), peft)):
        found = backend.target_logits(texts, targets)
        expected = []
        for text, target in zip(texts, targets, strict=True):
            every = (front or model)(input_ids=torch.tensor([[*text, *target]])).logits[0]
            every = every[2 if front else 0 :]
            expected += [every[len(text) - 1 + i] for i in range(len(target))]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert found.requires_grad


# --- the loop ---


def test_schedule_and_batches() -> None:
    rates = [schedule_at(step, 100, 5) for step in range(100)]
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and rates[-1] < 0.001
    lengths = [random.Random(0).randint(1, 50) for _ in range(103)]
    batches = grouped_batches(lengths, 10, 0)
    first = [next(batches) for _ in range(11)]
    assert sorted(i for batch in first for i in batch) == list(range(103))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first]
    assert max(spread) < 15
    again, other = grouped_batches(lengths, 10, 0), grouped_batches(lengths, 10, 1)
    assert first == [next(again) for _ in range(11)] != [next(other) for _ in range(11)]


def test_the_schedule_is_that_of_the_prompts_trainer() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 6, 120)
    for step in range(120):
        assert theirs.get_last_lr()[0] == pytest.approx(schedule_at(step, 120, 6))
        optimizer.step()
        theirs.step()


# --- costs ---


def test_operations_are_those_of_the_matrices() -> None:
    model = build("llama")
    own, head = matrix_weights(model)
    assert own == sum(m.weight.numel() for m in _linear_layers(model)) and head == 96 * 32
    found = cost(model, [10, 20], 5)
    width = 3 * 4 * 8
    assert found.flops == sum(2 * own * n + 2 * width * n * n + 2 * head for n in (15, 25)) / 2
    cached = sum(2 * own * n + 2 * width * ((n + 5) ** 2 - 25) + 2 * head for n in (10, 20)) / 2
    assert found.flops_cached == cached < found.flops and found.text_tokens == 15
    assert cost(model, [10], 0, uses_head=False).flops == 2 * own * 10 + 2 * width * 100


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peaks_are_forgotten() -> None:
    memory = PeakMemory("cpu")
    start = memory.reset()
    block = torch.ones(64 * 2**20)  # 256 MiB
    del block
    first = memory.peak()
    assert memory.resettable and first - start > 200 * 2**20
    memory.reset()
    assert first - memory.peak() > 200 * 2**20


# --- statistics ---


def test_mcnemar_is_the_binomial_of_the_discordant_rows() -> None:
    first = np.array([1] * 8 + [0] * 2 + [1] * 50 + [0] * 40)
    second = np.array([0] * 8 + [1] * 2 + [1] * 50 + [0] * 40)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024) == mcnemar(second, first)
    assert mcnemar(first, first) == 1.0


def test_permutations_flip_the_signs_of_rows() -> None:
    """Few rows: all 2^n signs; many: about what a t-test says."""
    from scipy.stats import ttest_rel

    assert paired_permutation(np.array([1.0, 2, 3, 4, 5]), np.zeros(5)) == pytest.approx(2 / 2**5)
    generator = np.random.default_rng(0)
    first, second = generator.random(300), generator.random(300) + 0.08
    expected = ttest_rel(first, second).pvalue
    assert 0.001 < expected < 0.2 and paired_permutation(first, second) == pytest.approx(expected, abs=0.02)
    assert paired_permutation(first, first) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_bootstrap_is_near_the_normal_interval_and_weighs_rows() -> None:
    values = np.random.default_rng(0).random(400)
    half = 1.96 * values.std() / 20
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    weights = np.array([1.0, 2, 3, 4] * 10)
    assert bootstrap_interval(weights * 0.5, weights) == pytest.approx((0.5, 0.5))
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)


def result(method: str, seed: int, correct: list[int], **facts: Any) -> dict[str, Any]:
    costs = dict.fromkeys(("trainable_parameters", "stored_bytes", "prefix_tokens", "text_tokens"), 1.0)
    costs |= dict.fromkeys(("train_seconds", "evaluation_seconds", "flops_per_row", "flops_per_row_cached"), 1.0)
    costs |= dict.fromkeys(("memory_loaded", "memory_training", "memory_inference", "inference_seconds"), 1.0)
    rows = {
        "correct": correct,
        "predicted": ["yes" if hit else "no" for hit in correct],
        "losses": [0.1 if hit else 2.0 for hit in correct],
        "weights": [1.0] * len(correct),
    }
    return {"method": method, "seed": seed, "status": "ok", "options": {}, "rows": rows, **costs, **facts}


def test_summaries_over_seeds() -> None:
    truth = ["yes"] * 40
    worse = [1] * 25 + [0] * 15
    results = [
        result("zero-shot", 0, worse, inference_seconds=2.0),
        result("prompt", 0, [1] * 38 + [0] * 2),
        result("prompt", 1, [1] * 36 + [0] * 4),
        {"method": "lora", "seed": 0, "status": "error", "reason": "no", "options": {}},
        result("lora", 1, [1] * 40),
        {"method": "full", "seed": 0, "status": "error", "reason": "out of memory", "options": {}},
        {"method": "linear-probe", "seed": 0, "status": "not applicable", "reason": "text", "options": {}},
    ]
    found = {s.method: s for s in summarise(results, ["zero-shot", "prompt", "lora", "linear-probe", "full"], truth)}
    prompt = found["prompt"]
    assert prompt.score == pytest.approx(37 / 40) and prompt.score_sd == pytest.approx(np.std([38, 36], ddof=1) / 40)
    assert prompt.interval == "bootstrap" and prompt.score_low is not None and prompt.score_high is not None
    assert prompt.score_low < 37 / 40 < prompt.score_high and prompt.p is None
    zero = found["zero-shot"]
    from softprompt_fast.tuning.evaluation import wilson_interval

    assert zero.interval == "wilson" and (zero.score_low, zero.score_high) == wilson_interval(25, 40)
    assert zero.difference == pytest.approx(25 / 40 - 37 / 40) and zero.test == "permutation"
    both = (np.array([1] * 38 + [0] * 2) + np.array([1] * 36 + [0] * 4)) / 2
    assert zero.p == paired_permutation(np.array(worse), both) and zero.inference_seconds_per_1000 == 50.0
    lora = found["lora"]
    assert lora.status == "partly failed" and lora.reasons == ["seed 0: no"] and lora.seeds == [1]
    assert lora.test == "mcnemar" and lora.p == mcnemar(np.ones(40), np.array([1] * 36 + [0] * 4)) == 2 / 2**4
    assert (lora.score_low, lora.score_high) == wilson_interval(40, 40)
    assert [zero.p_holm, lora.p_holm] == holm([zero.p, lora.p])
    assert found["full"].status == "failed" and found["linear-probe"].status == "not applicable"
    from sklearn.metrics import f1_score

    assert zero.macro_f1 == pytest.approx(f1_score(truth, results[0]["rows"]["predicted"], average="macro"))


def test_summaries_of_losses() -> None:
    def losses(method: str, values: list[float]) -> dict[str, Any]:
        rows = {"correct": None, "predicted": None, "losses": values, "weights": [2.0] * len(values)}
        return result(method, 0, [1], rows=rows)

    generator = np.random.default_rng(0)
    a, b = generator.random(50) + 1, generator.random(50)
    lora, prompt = summarise([losses("lora", list(a)), losses("prompt", list(b))], ["lora", "prompt"], [])
    assert prompt.score == pytest.approx(b.sum() / 100) == prompt.loss and prompt.interval == "bootstrap"
    assert lora.difference == pytest.approx((a - b).sum() / 100) and lora.test == "permutation"
    assert lora.p is not None and lora.p < 0.01


def summary(method: str, score: float, p: float | None, stored: float, front: float = 0.0) -> MethodSummary:
    return MethodSummary(
        method, "", "ok", score=score, difference=score - 0.8, p_holm=p, stored_bytes=stored, prefix_tokens=front
    )


PROMPT = summary("prompt", 0.8, None, 1000, 20)
VERDICTS = {
    "alone": ([PROMPT], "No answer: no other"),
    "missing": ([summary("lora", 0.9, 0.01, 10)], "No answer: the soft prompt"),
    "free": (
        [PROMPT, summary("zero-shot", 0.79, 0.4, 0), summary("lora", 0.5, 0.01, 9)],
        "No, not by these numbers: zero-shot",
    ),
    "small": (
        [PROMPT, summary("zero-shot", 0.6, 0.01, 0), summary("linear-probe", 0.9, 0.01, 10)],
        "No: linear-probe is clearly",
    ),
    "large": ([PROMPT, summary("lora", 0.9, 0.01, 5000)], "It depends: lora is clearly better"),
    "alike": ([PROMPT, summary("linear-probe", 0.81, 0.5, 10)], "It may be, but linear-probe"),
    "yes": (
        [PROMPT, summary("zero-shot", 0.6, 0.01, 0), summary("lora", 0.81, 0.9, 5000)],
        "Yes: accuracy 0.800 with a soft",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_follows_its_rules(case: str) -> None:
    summaries, start = VERDICTS[case]
    assert verdict(summaries, "classification").startswith(start)


def test_losses_are_better_when_lower() -> None:
    worse = summary("zero-shot", 0.9, 0.01, 0)
    assert verdict([PROMPT, worse], "generation").startswith("Yes: loss 0.800")
    assert verdict([PROMPT, summary("lora", 0.7, 0.01, 9e9)], "generation").startswith("It depends: lora")


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
        ("`learning_rate` must be positive", {"options": {"prompt": {"learning_rate": -1.0}}}),
        ("`init` of 'peft-prompt' must be one of RANDOM, .* got 'x'", {"options": {"peft-prompt": {"init": "x"}}}),
        ("`seeds` must hold at least one", {"seeds": []}),
        ("`steps` must be positive, got 0", {"steps": 0}),
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
    with pytest.raises(ValueError, match="`train` must hold texts that do not stand in"):
        clean_splits(TASK, test, other, test)


def test_a_job_is_known_by_its_settings_and_data(tmp_path: Path) -> None:
    job = job_of("lora", tmp_path)
    assert job.key() == replace(job, result="elsewhere", data="there", artifacts="here", threads=3).key()
    for change in ({"data_digest": "x"}, {"seed": 1}, {"options": {**job.options, "r": 4}}, {"model_digest": "y"}):
        assert replace(job, **change).key() != job.key()


# --- jobs in processes ---


def fake_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(pool, "WORKER", ["-c", code])


def test_a_process_that_dies_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        pool.run_jobs(jobs, tmp_path, at_once=2, report=interrupt)
    parent, child = map(int, Path(f"{tmp_path / 'data'}.pids").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(parent, 0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def compared(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:  # noqa: F811
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
    monkeypatch.setattr("softprompt_fast.tuning.models.load_base_model", lambda *_: (build("llama"), tiny_tokenizer()))
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
    monkeypatch.setattr("softprompt_fast.tuning.models.load_base_model", lambda *_: (build("t5"), tiny_tokenizer()))
    assert worker.main(str(tmp_path / "job.json")) == 1
    found = read_json(Path(job.result))
    assert found is not None and "must be a decoder, got T5" in found["reason"]


def test_every_method_stands_in_the_report_also_without_a_result(tmp_path: Path) -> None:
    truth = ["yes"] * 30
    every = [result(m, 0, [1] * (20 + i) + [0] * (10 - i), detail={}) for i, m in enumerate(METHODS)]
    every[-1] = {"method": "full", "seed": 0, "status": "error", "reason": "<out> of memory", "options": {}}
    facts = {
        "data": "rows",
        "model": "tiny",
        "metric": "accuracy",
        "rows": {"train": 1, "validation": 1, "test": 30},
        "left_out": {},
        "labels": {name: {"yes": 1} for name in ("train", "validation", "test")},
        "seeds": [0],
        "steps": 1,
        "batch_size": 1,
        "task": asdict(TASK),
        "jobs_at_once": 2,
        "environment": {},
    }
    summaries = summarise(every, METHODS, truth)
    write_files(Comparison(tmp_path, facts, summaries, every, verdict(summaries, "classification")))
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{method}</td>" in page for method in METHODS)
    assert "&lt;out&gt; of memory" in page and "http" not in page
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(METHODS)
