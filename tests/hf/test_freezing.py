"""Who freezes and who trains a parameter: the order in which they come and go does not matter."""

from __future__ import annotations

import gc
from itertools import permutations

import pytest
from torch import nn, zeros

from softprompt_fast.hf.freezing import freeze, keep_trainable, train

KINDS = {"frozen": freeze, "kept": keep_trainable, "trained": train}


def expected(own: bool, held: set[str]) -> bool:
    if "trained" in held:
        return True
    return own and not ("frozen" in held and "kept" not in held)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("taken", list(permutations(["trained", "frozen"])))
@pytest.mark.parametrize("dropped", list(permutations(["trained", "frozen"])))
def test_a_parameter_is_as_the_remaining_ones_need_it(
    own: bool, taken: tuple[str, ...], dropped: tuple[str, ...]
) -> None:
    parameter = nn.Parameter(zeros(2), requires_grad=own)
    held = {}
    for kind in taken:
        held[kind] = KINDS[kind]([parameter])
        assert parameter.requires_grad is expected(own, set(held))
    for kind in dropped:
        del held[kind]
        gc.collect()
        assert parameter.requires_grad is expected(own, set(held))


def test_two_of_each_kind() -> None:
    parameter = nn.Parameter(zeros(2))
    first, second = freeze([parameter]), freeze([parameter])
    trained, too = train([parameter]), train([parameter])
    del first, trained
    assert parameter.requires_grad
    del too
    assert not parameter.requires_grad
    del second
    assert parameter.requires_grad


def test_a_kept_parameter_is_frozen_when_nobody_keeps_it_any_more() -> None:
    parameter = nn.Parameter(zeros(2))
    kept = keep_trainable([parameter])
    frozen = freeze([parameter])
    assert parameter.requires_grad
    del kept
    assert not parameter.requires_grad
    del frozen
    assert parameter.requires_grad


def test_what_the_caller_froze_is_left_to_the_caller() -> None:
    parameter = nn.Parameter(zeros(2), requires_grad=False)
    frozen = freeze([parameter])
    assert not frozen
    parameter.requires_grad_(True)
    del frozen
    assert parameter.requires_grad
