"""The budget of a search: its costs, its plan, and that no search exceeds it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt_fast.length_search.budget import LEAST_STEPS, Costs, make_plan, rung_sizes

COSTS = Costs(text_per_step=960, prompts_per_step=1, text_per_row=30, prompts_per_row=1 / 32, rows=400)


def test_costs_of_a_step_and_of_a_full_run() -> None:
    assert COSTS.step(20) == 2 * (960 + 20)
    assert COSTS.scoring(64, 100) == 100 * (30 + 2)
    assert COSTS.full_run(120, 20) == 120 * 1960 + 5 * 400 * (30 + 20 / 32) + 400 * 30


def test_the_default_plan_halves_seven_lengths_within_two_full_runs() -> None:
    plan = make_plan(COSTS, [1, 2, 5, 10, 20, 50, 100], 120, 20, 2.0)
    assert [rung.candidates for rung in plan.rungs] == [7, 3, 2]
    assert plan.most_steps == sum(rung.candidates * rung.steps for rung in plan.rungs)
    assert 0.85 * 240 <= plan.most_steps <= 0.95 * 240 and 0.85 <= plan.cost / 2 <= 0.95
    assert plan.rungs[-1].rows == 400 and plan.rungs[-1].total_steps == sum(rung.steps for rung in plan.rungs)
    assert rung_sizes(1, 2.0) == [1] and rung_sizes(3, 3.5) == [3] and rung_sizes(30, 1.0) == [30, 10, 4, 2]


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    steps=st.integers(1, 2000),
    budget=st.floats(0.2, 12.0),
    text=st.floats(1, 20_000),
    rows=st.integers(2, 20_000),
    prompts=st.sampled_from([0.0, 1.0, 32.0]),
    data=st.data(),
)
def test_no_search_exceeds_its_budget_whichever_candidates_continue(
    lengths: list[int], steps: int, budget: float, text: float, rows: int, prompts: float, data: Any
) -> None:
    costs = Costs(text, prompts, text / 32, prompts / 32, rows)
    full_length = data.draw(st.sampled_from(lengths))
    try:
        plan = make_plan(costs, lengths, steps, full_length, budget)
    except ValueError as error:
        assert "but a candidate needs at least" in str(error)
        return
    alive, spent, cost, level = list(lengths), 0, costs.scoring(0, rows), 0
    for rung in plan.rungs:
        alive = data.draw(st.permutations(alive))[: rung.candidates]
        assert rung.steps >= min(LEAST_STEPS, steps - level) and 1 <= rung.rows <= rows
        spent += rung.steps * len(alive)
        cost += sum(rung.steps * costs.step(length) + costs.scoring(length, rung.rows) for length in alive)
        level += rung.steps
        assert level == rung.total_steps <= steps
    assert rung.rows == rows
    most = 0.95 * budget  # the rest is reserved
    assert spent == plan.most_steps <= most * steps
    assert cost <= most * costs.full_run(steps, full_length) * (1 + 1e-9)
    assert plan.cost <= most * (1 + 1e-9)


def test_a_budget_that_is_too_small_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"`budget` of 2 full runs of 20 steps leaves \d steps for each of 7 cand"):
        make_plan(COSTS, [1, 2, 5, 10, 20, 50, 100], 20, 20, 2.0)
    with pytest.raises(ValueError, match="`budget` must be a positive number of full runs, got nan"):
        make_plan(COSTS, [1], 20, 1, math.nan)
