"""The comparison with PEFT's self-study recipe: the recipe's loss is the stated one, and both learn the same rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, logits_after_text, queries

from softprompt_fast.models import DeepPromptModel

peft = pytest.importorskip("peft")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABOUT = {"text": TEXT, "template": TEMPLATE}
STEPS, TOKENS = 32, 6


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("bench_self_study")
    finally:
        sys.path.remove(str(BENCHMARKS))


def cartridge_of(model: Any) -> Any:
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1)
    return peft.get_peft_model(model, config)


def test_both_learn_the_same_rows_and_come_closer_to_the_teacher(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: dict[str, list[list[int]]] = {"theirs": [], "ours": []}
    compute, step_loss = bench.RecipeTrainer.compute_loss, bench.batch_loss

    def theirs(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        learnt["theirs"].append(inputs["answer"][0].tolist())
        return compute(self, model, inputs, *more, **options)

    def ours(student: Any, prompt: str, targets: Any, temperature: float) -> Any:
        if torch.is_grad_enabled():
            learnt["ours"] += [one.query + one.continuation for one in targets]
        return step_loss(student, prompt, targets, temperature)

    monkeypatch.setattr(bench.RecipeTrainer, "compute_loss", theirs)
    monkeypatch.setattr(bench, "batch_loss", ours)
    monkeypatch.setattr(bench, "RATE", 0.03)
    plan = bench.Plan(steps=STEPS, tokens=TOKENS, seed=0, new_tokens=5, device="cpu")
    every = queries(20)
    rows = bench.study(build("llama"), build("llama"), tiny_tokenizer(), ABOUT, every[:14], every[14:], plan)
    assert learnt["ours"] == learnt["theirs"] and len(learnt["ours"]) == STEPS
    start, recipe, same, own = rows
    assert [row["training"] for row in rows] == [bench.START, bench.PEFT, bench.SAME, bench.OWN]
    assert start["training_kl"] > max(recipe["training_kl"], same["training_kl"], own["training_kl"])
    assert recipe["peft_over_this"] == 1.0 and recipe["step_s"] > 0 and same["step_s"] > 0
    assert same["peft_over_this"] == pytest.approx(recipe["step_s"] / same["step_s"], rel=0.1)
    assert (own["batch"], own["steps"], own["rate"]) == (14, 2, 1e-3)
    assert {(row["queries"], row["held_out"]) for row in rows} == {(14, 6)}


def test_the_recipe_loss_is_the_cross_entropy_of_the_most_probable_tokens(bench: Any, tmp_path: Path) -> None:
    text, query, continuation = [5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16]
    base = build("llama")
    expected_teacher = logits_after_text(base, text, query[:1], query[1:] + continuation).log_softmax(-1)
    cartridge = cartridge_of(base)
    bench.start_from_text(cartridge, text)
    # Four keys and values of the text are what the plain model has after the text's first four tokens.
    student = logits_after_text(base, text[:4], query[:1], query[1:] + continuation).log_softmax(-1)
    top = expected_teacher.sort(-1, descending=True)
    expected = sum(
        -(top.values[m, k].exp() * student[m, top.indices[m, k]]) for m in range(4) for k in range(bench.TOP_K)
    )
    batch = bench.collate([{"row": 0, "whole": [*text, *query, *continuation], "answer": query + continuation}])
    trainer = bench.RecipeTrainer(
        model=cartridge,
        args=bench.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        text_tokens=len(text),
    )
    loss = trainer.compute_loss(cartridge, batch)
    torch.testing.assert_close(loss, torch.as_tensor(expected) / 4, rtol=1e-4, atol=1e-5)
    loss.backward()
    gradients = [name for name, parameter in cartridge.named_parameters() if parameter.grad is not None]
    assert gradients == ["prompt_encoder.default.trainable_embedding"]


def test_another_start_is_refused(bench: Any) -> None:
    class Prepared:
        student = DeepPromptModel(build("llama"))

    cartridge = cartridge_of(build("llama"))
    values = bench.start_from_text(cartridge, [5, 6, 7, 8, 9])
    target = bench.Target([12, 13], [14, 15], torch.empty(0), torch.empty(0))
    Prepared.student.add_prompt(bench.START, init=values)
    bench.check_same_start(cartridge, Prepared, target)
    with torch.no_grad():
        Prepared.student.prompts[bench.START].add_(1.0)
    with pytest.raises(ValueError, match="both must start with the same probabilities, got a divergence of"):
        bench.check_same_start(cartridge, Prepared, target)
