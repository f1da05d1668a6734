"""Ways to use a model: what each method, its backend, its loop and its costs are."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.comparison_cases import ANSWERS, LONG_WORDS, SPLITS, TASK, weights_of, work_of
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.base.files import size_of
from softprompt_fast.comparison.backends import Packed, PeftPrompt, Plain
from softprompt_fast.comparison.cost import cost, matrix_weights
from softprompt_fast.comparison.encoding import Encoder, draw_shots, fitting_shots
from softprompt_fast.comparison.loop import grouped_batches, schedule_at
from softprompt_fast.comparison.memory import PeakMemory
from softprompt_fast.comparison.methods import RUNNERS
from softprompt_fast.comparison.scores import score_rows
from softprompt_fast.comparison.settings import METHODS
from softprompt_fast.comparison.work import NotApplicable
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.evaluation.prompt_scoring import score_prompts
from softprompt_fast.tasks.task import Task

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


def test_a_prefix_does_not_shorten_the_text() -> None:
    tokenizer = tiny_tokenizer()
    row = {"text": "film " * 30 + "fine", "label": "yes"}
    task = replace(TASK, max_length=10)
    alone = Encoder(task, tokenizer).text(row)
    after = Encoder(task, tokenizer, "very dull\n").text(row)
    assert len(alone) == 10 and after == tokenizer("very dull").input_ids + alone
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
    packed = score_rows(Packed(spf.SoftPromptModel(build(architecture))), encoder, rows, 4)
    torch.testing.assert_close(plain.losses, packed.losses, atol=1e-4, rtol=1e-4)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft = get_peft_model(build(architecture), config)
    values = peft.get_prompt_embedding_to_save("default")
    tuned = spf.SoftPromptModel(build(architecture))
    tuned.add_prompt("p", init=values.clone())
    theirs = score_rows(PeftPrompt(peft.eval(), tokenizer, 3), encoder, rows, 4)
    ours = score_rows(Packed(tuned, "p"), encoder, rows, 4)
    torch.testing.assert_close(theirs.losses, ours.losses, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours.losses, packed.losses, atol=1e-3)


def test_training_logits_are_those_of_the_targets() -> None:
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
