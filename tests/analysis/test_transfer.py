"""Stored prompts ranked as starting points for a task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.analysis_cases import TASKS, helpful_prompt, sane, tuned_on
from support.tiny_reviews import reviews, tiny_tokenizer

from softprompt_fast.analysis.figures import similarity_figure
from softprompt_fast.analysis.transfer import NO_PROMPT, similar
from softprompt_fast.base.figures import save_figure
from softprompt_fast.evaluation.predictions import evaluate


def test_sources_are_ranked_by_the_loss_on_the_rows(tmp_path: Path) -> None:
    task = TASKS["one-token"]
    helpful = helpful_prompt(task)[1:3]
    sources = {"noise": torch.randn(6, 32), "helpful": helpful, "flipped": -helpful}
    rows = [*reviews(20), {"text": "film", "label": None}]
    ranked = similar(tuned_on(), tiny_tokenizer(), task, rows, sources, target=helpful, batch_size=6)
    assert ranked[0].name == "helpful" and {s.name for s in ranked} == {*sources, NO_PROMPT}
    losses = [s.scores["loss"] for s in ranked if s.scores]
    assert losses == sorted(losses) and len(losses) == 4
    for source in ranked:
        alone = tuned_on() if source.name == NO_PROMPT else tuned_on(p=sources[source.name])
        assert source.scores["loss"] == pytest.approx(  # type: ignore[index]
            evaluate(alone, tiny_tokenizer(), task, reviews(20))["loss"], abs=1e-4
        )
    cosines = {s.name: s.mean_cosine for s in ranked}
    assert cosines["helpful"] == pytest.approx(1.0) and cosines["flipped"] == pytest.approx(-1.0)
    assert cosines[NO_PROMPT] is None
    sane([s.to_json() for s in ranked])
    save_figure(similarity_figure(ranked), tmp_path / "s.svg")


def test_sources_without_rows_are_ranked_by_cosine(tmp_path: Path) -> None:
    target = torch.randn(3, 32)
    sources = {"far": -target, "near": target + 0.1 * torch.randn(3, 32), "other": torch.randn(7, 32)}
    ranked = similar(tuned_on(), tiny_tokenizer(), None, [], sources, target)
    assert [s.name for s in ranked] == ["near", "other", "far"] and ranked[0].scores is None
    save_figure(similarity_figure(ranked), tmp_path / "s.svg")
    for arguments, message in (
        ((None, [], sources), "give `rows` or `target`"),
        ((None, reviews(2), sources), "give `task` together with `rows`"),
        ((None, [], {}, target), "`sources` must hold at least one prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            similar(tuned_on(), tiny_tokenizer(), *arguments)
