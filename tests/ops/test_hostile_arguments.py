"""The private ops called directly with hostile arguments: they raise or give a defined result, and touch nothing else.

`make sanitize` runs this under AddressSanitizer, with more calls.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.devices import DEVICE, ON_GPU
from support.op_cases import poisoned, same_bits
from support.segments import table
from torch import Tensor

from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.extension.contract import Status
from softprompt_fast.ops.packing import RowTable

CALLS = int(os.environ.get("FUZZ_CALLS", "1500"))
HOSTILE = (-1, 0, 1, 2, 3, 5, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))  # none between: memory is finite
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.cfloat)
ROWS = table([(0, 3)] * 3, [2, 5, 1], 3)

Arguments = dict[str, Any]


def padded() -> Arguments:
    return {
        "input_ids": torch.randint(9, (3, 4)),
        "embedding": torch.randn(9, 8),
        "prompts": torch.randn(5, 8),
        "prompt_offsets": torch.tensor([0, 3, 5]),
        "prompt_ids": torch.tensor([0, 1, -1]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]]),
        "labels": torch.randint(9, (3, 4)),
        "plan": None,
        "slots": 21,
        "width": 7,
        "prompt_segments": 0,
        "left": True,
        "mask_format": random.randrange(4),
        "causal": True,
        "window": 2,
        "scale": 1.0,
        "token_update": torch.randn(2, 3, 8),
    }


def packed() -> Arguments:
    plan = torch.tensor([[0, 3, 0, 0], [3, 2, 1, 0], [5, 2, 0, 3], [7, 4, 1, 2], [11, 3, -1, 0]])
    return padded() | {"plan": plan, "slots": 14, "width": 4, "prompt_segments": 2, "mask_format": 0}


def prompt_backward() -> Arguments:
    return {
        "grad": torch.randn(3, 7, 8),
        "prompt_slots": torch.tensor([0, 7, 14, -1]),
        "use_ids": torch.tensor([0, 1, 0, 1]),
        "prompt_offsets": torch.tensor([0, 3, 5]),
        "prompt_rows": 5,
        "dtype": torch.float32,
    }


def embedding_backward() -> Arguments:
    return {
        "grad": torch.randn(3, 7, 8),
        "input_ids": torch.randint(9, (3, 4)),
        "token_slots": torch.randint(-1, 21, (3, 4)),
        "vocabulary": 9,
        "padding_idx": 4,
        "scale": 2.0,
        "dtype": torch.float32,
    }


def unpack() -> Arguments:
    tensors = [torch.randn(11, 2, 8), torch.randn(11, 2, 4)]
    return {"packed": tensors, "table": ROWS.clone(), "width": 8, "dtype": torch.float32}


def pack() -> Arguments:
    places, starts = RowTable(ROWS, 8).holders(11)
    tensors = [torch.randn(3, 8, 2, 8), torch.randn(3, 8, 2, 4)]
    return {"rows": tensors, "places": places, "starts": starts, "dtype": torch.float32}


def attention() -> Arguments:
    return {
        "query": torch.randn(11, 4, 8),
        "key": torch.randn(11, 2, 8),
        "value": torch.randn(11, 2, 4),
        "table": ROWS.clone(),
        "queries": random.choice([None, torch.tensor([[0, 2], [2, 1], [3, 1]])]),
        "prefix_key": torch.randn(5, 2, 8),
        "prefix_value": torch.randn(5, 2, 4),
        "scale": 0.5,
        "window": random.choice([0, 2]),
    }


def attention_backward() -> Arguments:
    asked = attention()
    del asked["queries"]
    results = {"out": torch.randn(11, 4, 4), "log_sums": torch.randn(11, 4)}
    grad = {"grad": torch.randn(11, 4, 4)}
    last = {name: asked.pop(name) for name in ("scale", "window")}
    return grad | asked | results | last


CASES: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "assemble padded": ("assemble", padded),
    "assemble packed": ("assemble", packed),
    "prompt_backward": ("prompt_backward", prompt_backward),
    "embedding_backward": ("embedding_backward", embedding_backward),
    "unpack": ("unpack", unpack),
    "pack": ("pack", pack),
    "attention": ("attention", attention),
    "attention_backward": ("attention_backward", attention_backward),
}


def spoilt_tensor(x: Tensor) -> Any:
    """The tensor with another type, place, shape or content; mostly another content."""
    way = random.randrange(24)
    if way == 0:
        return None
    if way == 1:
        return x.to("meta")
    if way == 2:
        return x.to(random.choice(DTYPES))
    if way == 3:
        return x.to_sparse()
    if way == 4:
        return x[:0]
    if way == 5:
        return x[..., :0]
    if way == 6:
        return x.unsqueeze(0)
    if way == 7:
        return x.flatten()[0]
    if way == 8:
        return x.mT if x.dim() > 1 else x[None].mT
    if way == 9:
        return x[..., :1].clone().expand(x.shape)  # the same element: nothing is after it
    if way == 10:
        return x[:1].expand(x.shape)
    if way == 11:
        return x.repeat_interleave(2, -1)[..., ::2]
    if way == 12:
        return torch.cat([x, x])
    if way == 13:
        return x[: max(1, len(x) // 2)]
    if way == 14:
        return x.cfloat().conj() if x.is_floating_point() else x.flip(0)
    spoilt = x.clone()
    at = torch.rand(x.shape) < random.choice([0.1, 0.5])
    if x.is_floating_point():
        spoilt[at] = random.choice([float("nan"), float("inf"), -float("inf"), 1e38])
    else:
        spoilt[at] = random.choice([-(2**63), 2**63 - 1, 2**62, -1, 0, 1, len(x), 8, 12, 2**31])
    return spoilt


def spoilt(value: Any) -> Any:
    if isinstance(value, Tensor):
        return spoilt_tensor(value)
    if isinstance(value, list):
        others = [[], value * 3, [value[0], spoilt_tensor(value[1])], [spoilt_tensor(x) for x in value]]
        return random.choice(others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, torch.dtype):
        return random.choice(DTYPES)
    if isinstance(value, float):
        return random.choice([float("nan"), float("inf"), 0.0, -1e308])
    return None if value is None else random.choice(HOSTILE)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def outcome(op: Callable[..., Any], arguments: Arguments) -> list[Tensor] | str:
    """The results, or the error."""
    try:
        return flat(op(*arguments.values()))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return type(error).__name__


def assert_defined(op: Callable[..., Any], arguments: Arguments) -> bool:
    """The call raises (False), or gives the same bits twice, whatever was in memory before."""
    first = outcome(op, arguments)
    with poisoned():
        second = outcome(op, arguments)
    if isinstance(first, str) or isinstance(second, str):
        assert first == second
        return False
    for one, other in zip(first, second, strict=True):
        assert one.device.type == "meta" or same_bits(one, other), "another result in other memory"
    return True


@pytest.mark.parametrize("case", CASES)
def test_raises_or_gives_a_defined_result(native: backend.Ops, case: str) -> None:
    name, make = CASES[case]
    op = getattr(native, name)
    assert assert_defined(op, make())
    random.seed(CALLS)
    defined = 0
    for _ in range(CALLS // len(CASES)):
        arguments = make()
        for argument in random.sample(sorted(arguments), random.choice([1, 1, 2])):
            arguments[argument] = spoilt(arguments[argument])
        defined += assert_defined(op, arguments)
    assert 0 < defined < CALLS // len(CASES)


LARGE = 2**63 - 1
ASKING = torch.tensor([[0, 2], [1, 1]])


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("assemble padded", {"window": -1}, "window must be 0 or more"),
        ("assemble padded", {"mask_format": 2**32}, "mask_format must be 0 to 3, got 4294967296"),
        ("assemble padded", {"width": 2**62, "slots": -(2**62)}, "must be 0 or more"),
        ("assemble padded", {"width": 2**62 + 7}, "slots must be rows \\* width"),
        ("assemble padded", {"labels": torch.randn(3, 4).cdouble()}, "labels must be int32 or int64"),
        ("assemble padded", {"prompt_offsets": torch.tensor([], dtype=torch.int64)}, "prompt_offsets must have"),
        ("assemble packed", {"plan": torch.tensor([[0, 14, -1, 0]] * 5)}, "segment 0 of the plan"),
        ("assemble packed", {"plan": torch.tensor([[-4, 4, -1, 0]] * 5)}, "segment 0 of the plan"),
        ("assemble packed", {"plan": torch.tensor([[0, 3, 0, LARGE]] * 5)}, "segment 1 of the plan"),
        ("assemble packed", {"plan": torch.tensor([[0, 0, -1, 0]] * 5)}, "the plan must have 14 slots, got 0"),
        ("assemble packed", {"prompt_segments": LARGE}, "plan must be"),
        ("assemble packed", {"prompt_segments": -1, "plan": torch.zeros(2, 4, dtype=torch.int64)}, "plan must be"),
        ("prompt_backward", {"grad": torch.randn(8)}, "grad must have 2 dimensions or more"),
        ("embedding_backward", {"token_slots": torch.zeros(12, dtype=torch.int64)}, "token_slots must have"),
        ("attention", {"query": torch.randn(11, 0, 8)}, "query must be"),
        ("attention", {"prefix_key": torch.randn(1, 5, 2, 8)}, "must have 3 dimensions"),
        ("attention", {"table": torch.tensor([[0, 3, 0, 0], [2, 3, 0, 0]]), "queries": None}, "must not overlap"),
        ("attention", {"table": torch.tensor([[0, 2, 0, 0]] * 2), "queries": ASKING}, "must not overlap"),
        ("attention_backward", {"log_sums": torch.randn(11)}, "log_sums must be 44 adjacent float32"),
        ("attention_backward", {"log_sums": torch.randn(11, 4).double()}, "log_sums must be 44 adjacent float32"),
        ("attention_backward", {"out": torch.randn(11, 4, 3), "grad": torch.randn(11, 4, 3)}, "grad and out must be"),
        ("attention_backward", {"out": torch.randn(11, 4, 4).bfloat16()}, "grad and out must be"),
    ],
)
def test_is_refused(native: backend.Ops, case: str, changes: Arguments, message: str) -> None:
    name, make = CASES[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(native, name)(*(make() | changes).values())


class MovedArguments:
    """The ops for arguments that are copied to the GPU."""

    def __init__(self, ops: backend.Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(x) for x in value]
            return value.to(DEVICE) if isinstance(value, Tensor) else value

        return lambda *arguments: getattr(self._ops, name)(*(moved(value) for value in arguments))


@pytest.mark.parametrize("ops", ["native", "emulated", pytest.param("cuda", marks=ON_GPU)])
def test_what_contents_ask_for_beyond_the_tensors_is_left_out(ops: str, request: pytest.FixtureRequest) -> None:
    """Contents are not refused: on a GPU only the kernels see them."""
    moved = ops == "cuda"
    fixture: backend.Ops = request.getfixturevalue("native" if moved else ops)
    used = MovedArguments(fixture) if moved else fixture
    ones = prompt_backward() | {"grad": torch.ones(4, 8), "use_ids": None, "prompt_offsets": torch.tensor([0, 5])}
    result = used.prompt_backward(*(ones | {"prompt_slots": torch.tensor([2, LARGE, -5, 0])}).values())
    assert result[:, 0].tolist() == [2, 2, 1, 1, 0]  # slots 2 and 3, and 0 to 3
    nowhere = ones | {"prompt_slots": torch.zeros(4, dtype=torch.int64), "prompt_offsets": torch.tensor([LARGE, 5])}
    assert not used.prompt_backward(*nowhere.values()).any()
    before = ones | {"prompt_slots": torch.zeros(1, dtype=torch.int64), "prompt_offsets": torch.tensor([-LARGE, 5])}
    assert not used.prompt_backward(*before.values()).any()

    slots = torch.tensor([[0, 3, 4, LARGE]])
    for_ids = {"grad": torch.ones(4, 8), "input_ids": torch.zeros(1, 4, dtype=torch.int64), "token_slots": slots}
    result = used.embedding_backward(*(embedding_backward() | for_ids | {"padding_idx": -1}).values())
    assert result[:, 0].tolist() == [4] + [0] * 8  # slots 0 and 3, times 2

    lines = torch.tensor([[LARGE, LARGE, 1, -LARGE], [1, 9, -1, 2], [-LARGE, LARGE, LARGE, 2]])
    (rows,) = used.unpack([torch.ones(3, 1, 1)], lines, 5, torch.float32)
    assert rows.flatten(1).tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]

    places, starts = torch.tensor([0, 4, 5, -1, LARGE]), torch.tensor([-3, 2, LARGE, 1])
    (packed_rows,) = used.pack([torch.ones(1, 5, 1, 1)], places, starts, torch.float32)
    assert packed_rows.flatten().tolist() == [2, 0, 0]

    visible = padded() | {"window": LARGE, "causal": False, "mask_format": 2}
    wide = padded() | {"window": 0, "causal": False, "mask_format": 2}
    assert torch.equal(used.assemble(*visible.values())[1], used.assemble(*wide.values())[1])

    outside = [[-4, 3, 0, 0], [LARGE, 2, 1, 0], [0, 2, 0, LARGE], [7, LARGE, 1, 2], [11, -3, -1, 0]]
    if moved and DEVICE != "cpu":  # on a CPU the op looks at the plan
        status = used.assemble(*(packed() | {"plan": torch.tensor(outside)}).values())[-1]
        assert status[Status.BAD_LENGTH] == 0
