"""Pruning: which vectors and pieces are removed, and what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.analysis_cases import TASKS, helpful_prompt, sane, tuned_on
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.analysis.figures import pruning_figure
from softprompt_fast.analysis.pruning import apply_mask, prune
from softprompt_fast.base.figures import save_figure
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.tasks.task import Task


@pytest.mark.parametrize("rescore", [False, True])
def test_pruning_removes_noise_and_keeps_what_helps(rescore: bool, tmp_path: Path) -> None:
    task = TASKS["one-token"]
    prompt = helpful_prompt(task)
    before = prompt.clone()
    pruned = prune(tuned_on(), tiny_tokenizer(), task, prompt, reviews(32), reviews(64)[32:], rescore=rescore)
    assert torch.equal(prompt, before)
    assert pruned.removed and {1, 2} <= set(pruned.kept) and sorted(pruned.kept + pruned.removed) == [0, 1, 2, 3, 4]
    assert torch.equal(pruned.prompt, prompt[pruned.kept])
    for part, rows in ((pruned.selection, reviews(32)), (pruned.held_out, reviews(64)[32:])):
        for when, values in (("before", prompt), ("after", pruned.prompt)):
            expected = evaluate(tuned_on(p=values), tiny_tokenizer(), task, rows)
            assert part[when]["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert pruned.selection["after"]["loss"] <= pruned.selection["before"]["loss"]
    sane(pruned.to_json())
    save_figure(pruning_figure(pruned), tmp_path / "p.svg")
    own = pruned.save(tuned_on(), task, tmp_path / "out")
    again = spf.SoftPromptModel.from_pretrained(build("llama"), own)
    assert torch.equal(again.prompts["p"], pruned.prompt) and Task.load(own) == task
    assert "## Task" in (own / "README.md").read_text()
    with pytest.raises(FileExistsError, match="already exists; choose another"):
        pruned.save(tuned_on(), task, tmp_path / "out")


def test_pruning_stops_at_min_tokens_and_with_a_prompt_that_is_needed() -> None:
    task = TASKS["one-token"]
    options: dict[str, Any] = {"selection_rows": reviews(16), "held_out_rows": reviews(8)}
    prompt = torch.randn(4, 32)
    pruned = prune(tuned_on(), tiny_tokenizer(), task, prompt, tolerance=1e9, min_tokens=2, **options)
    assert len(pruned.kept) == 2
    first = pruned.loss_changes
    assert pruned.removed[0] == min(range(4), key=first.__getitem__)
    one = prune(tuned_on(), tiny_tokenizer(), task, prompt[:1], tolerance=1e9, **options)
    assert one.kept == [0] and one.removed == []
    for bad, message in (({"min_tokens": 5}, "`min_tokens` must be 1 to 4"), ({"pieces": 5}, "`pieces` must divide")):
        with pytest.raises(ValueError, match=message):
            prune(tuned_on(), tiny_tokenizer(), task, prompt, **options, **bad)


def test_pruning_keeps_the_vector_of_bos() -> None:
    task = replace(TASKS["one-token"], special_tokens=False)
    options: dict[str, Any] = {"selection_rows": reviews(16), "held_out_rows": reviews(8), "tolerance": 1e9}
    pruned = prune(tuned_on(), tiny_tokenizer(), task, torch.randn(4, 32), **options, pieces=2)
    assert len(pruned.kept) == 1 and pruned.kept == [0] and len(pruned.loss_changes) == 4


def test_pieces_are_set_to_zero_in_kept_vectors() -> None:
    task = TASKS["one-token"]
    pruned = prune(tuned_on(), tiny_tokenizer(), task, helpful_prompt(task), reviews(16), reviews(8), pieces=16)
    zero = (pruned.prompt.view(len(pruned.kept), 16, 2) == 0).all(-1)
    assert pruned.zeroed_pieces == zero.sum() > 0 and not zero.all(1).any()
    mask = torch.tensor([[True, False], [False, False]])
    assert apply_mask(torch.ones(2, 4), mask).tolist() == [[1, 1, 0, 0]]
