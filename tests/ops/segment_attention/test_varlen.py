"""The path of a GPU through variable-length attention: everything but the library's call, on a CPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.devices import DEVICE, ON_GPU
from support.segments import table
from support.varlen_stand_in import path_of_a_gpu, stand_in
from torch import Tensor

from softprompt_fast.ops.segment_attention import reference, varlen
from softprompt_fast.ops.segment_attention.ragged import RaggedPlan, ragged_keys

CASES = {
    "one prompt": torch.cat([table([(0, 0)], [5], 0), table([(0, 5)] * 3, [4, 1, 7], 5)]),
    "two prompts, a row without, an empty row": torch.cat(
        [table([(0, 0)] * 2, [3, 6], 0), table([(3, 6), (0, 0), (0, 3), (3, 6)], [2, 5, 0, 3], 9)]
    ),
    "no prompts": table([(0, 0)] * 3, [4, 1, 2], 0),
    "an empty prompt": torch.cat([table([(0, 0)], [0], 0), table([(0, 0)], [3], 0)]),
}
SIZES = {"equal heads": (2, 2, 8, 8), "grouped": (6, 2, 8, 4), "one key head": (3, 1, 5, 5)}


@pytest.fixture
def gpu_path() -> Iterator[list[str]]:
    with path_of_a_gpu() as calls:
        yield calls


def plan_of(lines: Tensor, prefix_slots: int | None = None) -> RaggedPlan:
    plan = RaggedPlan.of([tuple(line) for line in lines.tolist()], torch.device("cpu"), prefix_slots)
    assert plan is not None
    return plan


def leaves(slots: int, size: tuple[int, int, int, int]) -> list[Tensor]:
    heads, key_heads, length, value_length = size
    shapes = ((slots, heads, length), (slots, key_heads, length), (slots, key_heads, value_length))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("gpu_path")
def test_results_and_gradients_equal_the_reference(case: str, size: str, window: int | None) -> None:
    lines = CASES[case]
    tensors = leaves(int(lines[:, 1].sum()), SIZES[size])
    arguments: dict[str, Any] = {"prefix_key": None, "prefix_value": None, "scale": 0.3, "window": window or 0}
    got = varlen.varlen_attention(*tensors, plan_of(lines), **arguments)
    expected = reference.segment_attention(*tensors, lines, None, None, None, 0.3, window or 0)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((out * weights).sum(), tensors) for out in (got, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.usefixtures("gpu_path")
def test_prefixes_of_another_tensor(window: int | None) -> None:
    """Compiled prompts: rows only, and prefixes in any order among slots that nobody uses."""
    lines = table([(7, 3), (0, 0), (1, 5), (7, 3)], [2, 3, 1, 4], 0)
    tensors, before = leaves(10, SIZES["grouped"]), leaves(12, SIZES["grouped"])[1:]
    names = dict(zip(("prefix_key", "prefix_value"), before, strict=True))
    got = varlen.varlen_attention(*tensors, plan_of(lines, 12), **names, scale=0.3, window=window or 0)
    expected = reference.segment_attention(*tensors, lines, None, *before, 0.3, window or 0)
    torch.testing.assert_close(got, expected)
    found, wanted = (torch.autograd.grad(out.pow(2).sum(), [*tensors, *before]) for out in (got, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_slots_calls_no_library(gpu_path: list[str]) -> None:
    options: dict[str, Any] = {"prefix_key": None, "prefix_value": None, "scale": 1.0, "window": 0}
    out = varlen.varlen_attention(*leaves(0, SIZES["grouped"]), plan_of(table([], [], 0)), **options)
    assert out.shape == (0, 6, 4) and not gpu_path


def test_segments_that_do_not_follow_one_another_have_no_plan() -> None:
    assert RaggedPlan.of([(6, 4, 2, 3)], torch.device("cpu")) is None
    assert RaggedPlan.of([(0, 2, 0, 0), (3, 1, 0, 2)], torch.device("cpu")) is None


def test_gradients_of_shared_prefixes_are_summed_in_float32() -> None:
    lines = torch.cat([table([(0, 0)], [2], 0), table([(0, 2)] * 100, [1] * 100, 2)])
    plan = plan_of(lines)
    own = torch.randn(102, 1, 4).bfloat16().requires_grad_()
    grad = torch.rand(len(plan.sources), 1, 4).bfloat16()
    (found,) = torch.autograd.grad(ragged_keys(plan, own, None), own, grad)
    exact = own.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(ragged_keys(plan, exact, None), exact, grad.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=0)  # a running bfloat16 sum is off by 30 %


class FakeLibrary(types.ModuleType):
    """A library's function with the signature of one of its versions; it keeps the calls."""

    def __init__(self, module: str, name: str, parameters: str) -> None:
        super().__init__(module)
        self.calls: list[dict[str, Any]] = []
        names: dict[str, Any] = {"record": self._record}
        exec(f"def {name}(query, key, value, cu_q, cu_k, max_q, max_k, {parameters}): return record(locals())", names)
        setattr(self, name, names[name])

    def _record(self, call: dict[str, Any]) -> Tensor:
        self.calls.append(call)
        return call["query"]


@pytest.fixture
def forget() -> Iterator[None]:
    yield
    varlen.find.cache_clear()
    varlen.works.cache_clear()


@pytest.mark.parametrize("version", ["*, scale, window_size", "*, scale, window_size, enable_gqa=False"])
def test_torch_s_function_is_called_as_its_version_wants(
    version: str, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    library = FakeLibrary("torch.nn.attention.varlen", "varlen_attn", version)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    varlen.find.cache_clear()
    plan = plan_of(CASES["one prompt"])
    query, key, value = leaves(17, (4, 2, 8, 8))
    varlen.LIBRARIES["torch"](query, key, value, plan, 0.5, 0)
    varlen.LIBRARIES["torch"](query, key, value, plan, 0.5, 7)
    plain, windowed = library.calls
    assert plain["window_size"] == (-1, 0) and windowed["window_size"] == (6, 0)
    assert plain["scale"] == 0.5 and (plain["max_q"], plain["max_k"]) == (7, 12)
    if "enable_gqa" in version:
        assert plain["enable_gqa"] is True and plain["key"] is key
    else:
        assert plain["key"].shape[1] == 4


def test_a_version_without_windows_is_not_used(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    library = FakeLibrary("torch.nn.attention.varlen", "varlen_attn", "is_causal=False")
    monkeypatch.setitem(sys.modules, library.__name__, library)
    varlen.find.cache_clear()
    assert varlen.find("torch") is None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_library_that_is_wrong_or_fails_is_not_used(
    mode: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    varlen.works.cache_clear()

    def shifted(*arguments: Any) -> Tensor:
        return stand_in(*arguments).roll(1, 0)

    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    kind = (torch.device("cpu"), torch.float32, 4, 2, 8)
    for name, function, right in (("a", stand_in, True), ("b", shifted, False), ("c", broken, False)):
        monkeypatch.setitem(varlen.LIBRARIES, name, function)
        with mode():  # the first batch may be one without gradients
            assert varlen.works(name, *kind) is right
    assert "b is not used for packed batches: Tensor-likes are not close" in caplog.text
    assert "c is not used for packed batches: no kernel image" in caplog.text


@pytest.mark.parametrize("name", varlen.LIBRARIES)
class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("size", [(4, 4, 64), (8, 2, 128), (3, 1, 64)], ids=str)
    @pytest.mark.parametrize("dtype", varlen.DTYPES, ids=str)
    def test_the_library_equals_the_reference(self, name: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
        if DEVICE != "cuda" or varlen.find(name) is None:
            pytest.skip(f"{name} has no variable-length attention here")
        assert varlen.works(name, torch.device(DEVICE), dtype, *size)
