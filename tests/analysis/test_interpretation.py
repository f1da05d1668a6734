"""Interpretation of prompts: neighbours, norms, cosines, the effect of each vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.analysis_cases import TASKS, sane, tuned_on
from support.tiny_reviews import WORDS, reviews, tiny_tokenizer

from softprompt_fast.analysis.figures import interpretation_figure
from softprompt_fast.analysis.interpretation import CAVEAT, interpret, without
from softprompt_fast.analysis.similarity import aligned_cosine, mean_cosine, pairwise_cosine
from softprompt_fast.base.figures import save_figure
from softprompt_fast.evaluation.predictions import evaluate


def test_neighbours_and_norms_against_brute_force() -> None:
    tuned = tuned_on()
    table = tuned.get_input_embeddings().weight[: len(WORDS)].detach()
    prompt = torch.stack([table[4] * 3, table[7] * 0.5, torch.randn(32)])
    reading = interpret(tuned, tiny_tokenizer(), {"p": prompt}, k=3).prompts["p"]
    assert [(n[0].token, n[0].value) for n in reading.cosine[:2]] == [
        ("fine", pytest.approx(1.0)),
        ("dull", pytest.approx(1.0)),
    ]
    cosines = torch.nn.functional.cosine_similarity(prompt[:, None], table[None], dim=-1)
    for i in range(3):
        assert [n.id for n in reading.cosine[i]] == cosines[i].topk(3).indices.tolist()
        nearest = (table - prompt[i]).norm(dim=1).topk(3, largest=False)
        assert [n.id for n in reading.euclidean[i]] == nearest.indices.tolist()
        assert [n.value for n in reading.euclidean[i]] == pytest.approx(nearest.values.tolist(), abs=1e-4)
    assert reading.norms == pytest.approx(prompt.norm(dim=1).tolist())
    assert reading.norm_ranks[0] > 0.9 and reading.norm_ranks[1] < 0.1
    assert [reading.token_cosines[i][i] for i in range(3)] == pytest.approx([1.0] * 3)


def test_neighbours_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = {"p": torch.randn(4, 32)}
    whole = interpret(tuned_on(), tiny_tokenizer(), prompt, k=100).prompts["p"]
    monkeypatch.setattr("softprompt_fast.analysis.interpretation.CHUNK", 5)
    parts = interpret(tuned_on(), tiny_tokenizer(), prompt, k=100).prompts["p"]
    for a, b in ((whole.cosine, parts.cosine), (whole.euclidean, parts.euclidean)):
        assert [[n.id for n in row] for row in a] == [[n.id for n in row] for row in b]
    assert len(whole.cosine[0]) == len(WORDS)  # k is no more than there are


def test_scaled_embeddings_are_read_as_the_model_sees_them() -> None:
    tuned = tuned_on("gemma3")
    prompt = tuned.add_prompt("p", init="text", init_text="fine dull", tokenizer=tiny_tokenizer())
    reading = interpret(tuned, tiny_tokenizer(), {"p": prompt}).prompts["p"]
    assert [n[0].token for n in reading.euclidean] == ["fine", "dull"]
    assert reading.euclidean[0][0].value == pytest.approx(0.0, abs=1e-3)


def test_cosines_between_prompts() -> None:
    a, b = torch.randn(4, 32), torch.randn(2, 32)
    interpretation = interpret(tuned_on(), tiny_tokenizer(), {"a": a, "b": b, "longer": torch.cat([b, a])})
    assert interpretation.mean_cosine[0][1] == pytest.approx(mean_cosine(a, b)) == pytest.approx(mean_cosine(b, a))
    assert interpretation.aligned_cosine[1][2] == pytest.approx(1.0) and interpretation.aligned_cosine[0][2] < 0.9
    assert pairwise_cosine(a, a) < aligned_cosine(a, a) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", TASKS)
def test_ablation_is_the_difference_of_two_evaluations(kind: str) -> None:
    prompt, rows, task = torch.randn(3, 32), reviews(12), TASKS[kind]
    ablation = interpret(tuned_on(), tiny_tokenizer(), {"p": prompt}, task=task, rows=rows, batch_size=5).ablation
    assert ablation is not None and len(ablation.loss_change) == 3 and len(set(ablation.loss_change)) == 3
    whole = evaluate(tuned_on(p=prompt), tiny_tokenizer(), task, rows)
    for i in range(3):
        less = evaluate(tuned_on(p=without(prompt, i)), tiny_tokenizer(), task, rows)
        assert ablation.loss_change[i] == pytest.approx(less["loss"] - whole["loss"], abs=1e-4)
        if ablation.accuracy_change is not None:
            assert ablation.accuracy_change[i] == pytest.approx(less["accuracy"] - whole["accuracy"])
    assert all(half > 0 for half in ablation.loss_change_half_width)


@pytest.mark.parametrize("length", [1, 120])
def test_a_prompt_of_one_vector_and_one_longer_than_the_vocabulary(length: int, tmp_path: Path) -> None:
    prompts = {"p$_1$": torch.randn(length, 32)}
    rows = [*reviews(2), {"text": "", "label": "yes"}]
    tuned = tuned_on("gpt2") if length == 1 else tuned_on()
    interpretation = interpret(tuned, tiny_tokenizer(), prompts, task=TASKS["one-token"], rows=rows, k=1)
    assert len(interpretation.ablation.loss_change) == length and interpretation.ablation.rows == 2  # type: ignore[union-attr]
    sane(interpretation.to_json())
    save_figure(interpretation_figure(interpretation), tmp_path / "p.png")


def test_the_output_itself_says_that_neighbours_explain_nothing(tmp_path: Path) -> None:
    interpretation = interpret(tuned_on(), tiny_tokenizer(), {"a": torch.randn(2, 32), "b": torch.randn(3, 32)})
    assert "not an explanation" in CAVEAT and "2112.08348" in CAVEAT
    assert interpretation.to_json()["caveat"] == CAVEAT
    drawn = save_figure(interpretation_figure(interpretation), tmp_path / "p.svg")
    assert drawn.stat().st_size > 1000
    assert " ".join(interpretation_figure(interpretation).get_suptitle().split()) == CAVEAT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": {}}, "`prompts` must hold at least one"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"rows": reviews(2)}, "give `task` together with `rows`"),
        ({"rows": reviews(2), "task": TASKS["one-token"]}, r"`ablate` must be one of \['a', 'b'\], got None"),
        ({"rows": reviews(2), "task": TASKS["one-token"], "ablate": "c"}, "`ablate` must be one of"),
    ],
)
def test_mistakes_of_interpret(options: dict[str, Any], message: str) -> None:
    prompts = {"a": torch.randn(2, 32), "b": torch.randn(3, 32)}
    with pytest.raises(ValueError, match=message):
        interpret(tuned_on(), tiny_tokenizer(), **{"prompts": prompts} | options)
