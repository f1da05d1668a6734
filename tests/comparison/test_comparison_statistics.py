"""Comparisons: tests and intervals, summaries over seeds, the verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.comparison_cases import result

from softprompt_fast.comparison.summary import MethodSummary, summarise
from softprompt_fast.comparison.verdict import verdict
from softprompt_fast.evaluation.statistics import bootstrap_interval, holm, mcnemar, paired_permutation

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
    from softprompt_fast.evaluation.intervals import wilson_interval

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
