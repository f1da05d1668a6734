"""The native segment attention against its reference in float64, and the reference against SDPA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.op_cases import using
from support.segments import table
from torch import Tensor

from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.segment_attention import cached_attention, reference, segment_attention

pytestmark = pytest.mark.usefixtures("native")

# prompts first, each its own segment without a prefix; then texts after them
CASES = {
    "one prompt": (torch.cat([table([(0, 0)], [5], 0), table([(0, 5)] * 3, [4, 1, 7], 5)]), 17),
    "two prompts, a row without, an empty row": (
        torch.cat([table([(0, 0)] * 2, [3, 6], 0), table([(3, 6), (0, 0), (0, 3), (3, 6)], [2, 5, 0, 3], 9)]),
        20,
    ),
    "more keys than a block": (torch.cat([table([(0, 0)], [301], 0), table([(0, 301)] * 2, [9, 150], 301)]), 460),
    "slots that no segment holds": (table([(2, 3)], [4], 6), 14),
    "no segments": (table([], [], 0), 4),
}
SIZES = {"equal heads": (2, 2, 16, 16), "grouped": (6, 2, 20, 12), "one key head": (7, 1, 64, 64), "tiny": (2, 2, 3, 1)}


def expected_attention(
    q: Tensor, k: Tensor, v: Tensor, lines: Tensor, window: int | None, prefix: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The reference, in the tensors' own precision."""
    prefix_key, prefix_value = prefix or (None, None)
    return reference.segment_attention(
        q, k, v, lines, None, prefix_key, prefix_value, 1 / math.sqrt(q.shape[2]), window or 0
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, lines: Tensor, window: int | None) -> Tensor:
    """Each segment alone by ``scaled_dot_product_attention`` with a mask."""
    parts: list[tuple[int, Tensor]] = []
    for own, length, first, count in lines.tolist():
        slots = torch.cat([torch.arange(first, first + count), torch.arange(own, own + length)])
        distance = torch.arange(count, count + length)[:, None] - torch.arange(count + length)
        seen = (distance >= 0) & (distance < (window or 10**9))
        query, key, value = (x.transpose(0, 1) for x in (q[own : own + length], k[slots], v[slots]))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        parts.append((own, out.transpose(0, 1)))
    whole = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for own, out in parts:
        whole = torch.cat([whole[:own], out, whole[own + len(out) :]])
    return whole


def inputs(slots: int, size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    heads, key_heads, e, e2 = size
    made = [
        torch.randn(h, slots, n).to(dtype).transpose(0, 1) for h, n in ((heads, e), (key_heads, e), (key_heads, e2))
    ]
    return [x.requires_grad_() for x in made]


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    expected = expected.detach().double()
    return bool((got.detach().double() - expected).abs().max() <= tolerance * max(1e-3, float(expected.abs().max())))


@pytest.mark.parametrize("window", [None, 4, 140])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_equals_each_segment_alone(case: str, size: str, window: int | None) -> None:
    lines, slots = CASES[case]
    single = inputs(slots, SIZES[size])
    double = [x.detach().double().requires_grad_() for x in single]
    got = segment_attention(*single, lines, window=window)
    expected = expected_attention(*double, lines, window)
    assert got.shape == expected.shape and close(got, expected, 2e-6)
    if not len(lines):
        return
    weight = torch.randn(got.shape)
    got.backward(weight)
    expected.backward(weight.double())
    for mine, theirs in zip(single, double, strict=True):
        assert close(mine.grad, theirs.grad, 5e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_sdpa(case: str, size: str, window: int | None) -> None:
    lines, slots = CASES[case]
    ours = [x.detach().double().requires_grad_() for x in inputs(slots, SIZES[size])]
    theirs = [x.detach().requires_grad_() for x in ours]
    got, expected = segment_attention(*ours, lines, window=window), sdpa(*theirs, lines, window)
    torch.testing.assert_close(got, expected)
    if not len(lines):
        return
    weight = torch.randn_like(got)
    got.backward(weight)
    expected.backward(weight)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_runs_without_the_native_ops(dtype: torch.dtype) -> None:
    lines, slots = CASES["two prompts, a row without, an empty row"]
    native = inputs(slots, SIZES["grouped"], dtype)
    plain = [x.detach().requires_grad_() for x in native]
    got = segment_attention(*native, lines, window=4)
    weight = torch.randn_like(got)
    got.backward(weight)
    with using(None):
        other = segment_attention(*plain, lines, window=4)
        other.backward(weight)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    assert other.dtype == dtype and close(got, other, tolerance)
    for mine, theirs in zip(native, plain, strict=True):
        assert theirs.grad.dtype == dtype and close(mine.grad, theirs.grad, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    lines, slots = CASES["two prompts, a row without, an empty row"]
    half = inputs(slots, SIZES["grouped"], dtype)
    single = [x.detach().float().requires_grad_() for x in half]
    got, expected = segment_attention(*half, lines), segment_attention(*single, lines)
    assert got.dtype == dtype and torch.equal(got, expected.to(dtype))
    weight = torch.randn(got.shape).to(dtype)
    got.backward(weight)
    expected.backward(weight.float())
    for mine, theirs in zip(half, single, strict=True):
        assert mine.grad.dtype == dtype and close(mine.grad, theirs.grad, 1e-2)


def test_prefixes_may_be_in_tensors_of_their_own() -> None:
    lines = torch.tensor([[0, 3, 2, 5], [3, 4, 0, 7], [7, 1, 0, 0]])
    single, prefix = inputs(8, SIZES["grouped"]), inputs(7, SIZES["grouped"])[1:]
    double = [x.detach().double().requires_grad_() for x in (*single, *prefix)]
    got = segment_attention(*single, lines, prefix_key=prefix[0], prefix_value=prefix[1])
    expected = expected_attention(*double[:3], lines, None, (double[3], double[4]))
    assert close(got, expected, 2e-6)
    weight = torch.randn(got.shape)
    got.backward(weight)
    expected.backward(weight.double())
    for mine, theirs in zip((*single, *prefix), double, strict=True):
        assert close(mine.grad, theirs.grad, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["native", "reference"])
@pytest.mark.parametrize("window", [None, 3])
def test_queries_may_be_the_last_of_cached_keys(window: int | None, dtype: torch.dtype) -> None:
    query, key, value = (x.detach() for x in inputs(12, SIZES["grouped"], dtype))
    prefix = [x.detach() for x in inputs(7, SIZES["grouped"], dtype)[1:]]
    lines = torch.tensor([[0, 5, 2, 5], [6, 4, 0, 7], [11, 1, 0, 0]])
    whole = expected_attention(query, key, value, lines, window, (prefix[0], prefix[1]))
    asking = query[[3, 4, 9, 11]]
    queries = torch.tensor([[0, 2], [2, 1], [3, 1]])
    got = cached_attention(
        asking, key, value, lines, queries, window=window, prefix_key=prefix[0], prefix_value=prefix[1]
    )
    assert close(got, whole[[3, 4, 9, 11]], 2e-6)
    with pytest.raises(RuntimeError, match="queries 1 leave the query tensor"):
        cached_attention(asking, key, value, lines, torch.tensor([[0, 2], [2, 3], [3, 1]]))


def test_large_scores_do_not_overflow() -> None:
    lines, slots = CASES["more keys than a block"]
    single = [(x.detach() * 30).requires_grad_() for x in inputs(slots, SIZES["equal heads"])]
    expected = expected_attention(*(x.detach().double() for x in single), lines, None)
    got = segment_attention(*single, lines)
    assert close(got, expected, 1e-4)
    got.sum().backward()
    assert all(x.grad.isfinite().all() for x in single)


def test_a_number_that_is_none_stays_in_what_reads_it() -> None:
    lines, slots = CASES["two prompts, a row without, an empty row"]
    query, key, value = (x.detach() for x in inputs(slots, SIZES["equal heads"]))
    key[4] = torch.nan  # in the second prompt
    out = segment_attention(query, key, value, lines)
    broken = out.isnan().flatten(1).any(1)
    assert broken[[4, 9, 10, 16, 18]].all()  # the prompt's last vector, rows 0 and 3
    assert not broken[[0, 1, 2, 3, 11, 15]].any()  # the first prompt, the row without one


def test_the_same_bits_for_any_number_of_threads() -> None:
    lines = torch.cat([table([(0, 0)], [150], 0), table([(0, 150)] * 40, [7] * 40, 150)])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        tensors = inputs(430, SIZES["grouped"])
        out = segment_attention(*tensors, lines)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in tensors)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(native: backend.Ops) -> None:
    lines, slots = CASES["one prompt"]
    query, key, value = (x.detach() for x in inputs(slots, SIZES["grouped"]))
    arguments = (query, key, value, lines, None, None, None, 0.2, 0)
    torch.library.opcheck(torch.ops.softprompt_fast.attention.default, arguments)
    out, log_sums = native.attention(*arguments)
    arguments = (torch.ones_like(out), query, key, value, lines, None, None, out, log_sums, 0.2, 0)
    torch.library.opcheck(torch.ops.softprompt_fast.attention_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["native", "reference"])
def test_a_table_that_leaves_the_tensors_is_refused(dtype: torch.dtype) -> None:
    tensors = [x.detach() for x in inputs(6, SIZES["tiny"], dtype)]
    for line in ([4, 3, 0, 0], [0, 2, 5, 2], [-1, 2, 0, 0], [0, -2, 0, 0], [2**62, 2**62, 0, 0]):
        with pytest.raises(RuntimeError, match="line 0 of the table leaves the tensors"):
            segment_attention(*tensors, torch.tensor([line]))


def test_the_native_op_refuses_other_shapes_and_dtypes(native: backend.Ops) -> None:
    tensors, line = [x.detach() for x in inputs(6, SIZES["tiny"])], torch.tensor([[0, 1, 0, 0]])
    with pytest.raises(RuntimeError, match="query must be"):
        segment_attention(tensors[0][:, :1], tensors[1], tensors[2], line)
    with pytest.raises(RuntimeError, match="one of float32"):
        native.attention(*(x.double() for x in tensors), line, None, None, None, 1.0, 0)
