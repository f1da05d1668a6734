"""Bad input to ``assemble``: which exception, and that its message names the argument, the rule and the value."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.op_cases import using
from torch import nn

import softprompt_fast as spf
from softprompt_fast.ops.assemble.checks import describe_value
from softprompt_fast.ops.extension import backend

torch.manual_seed(0)  # values are in the names of the tests, which must be the same in all workers

NAN, INF = float("nan"), float("inf")


def call(**changes: Any) -> spf.PromptedBatch:
    """A good call (3 rows of 4 tokens, 11 words, 2 prompts, hidden size 6) with some arguments changed."""
    arguments: dict[str, Any] = {
        "input_ids": torch.arange(12).view(3, 4) % 11,
        "embedding": torch.randn(11, 6),
        "prompts": torch.randn(5, 6),
        "prompt_offsets": [0, 3, 5],
        "prompt_ids": [1, -1, 0],
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
        "labels": torch.zeros(3, 4, dtype=torch.int64),
    }
    return spf.assemble(**arguments | changes)


def filled(value: float, at: tuple[int, int], base: float = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[3, 4] with one value that differs."""
    values = torch.full((3, 4), base, dtype=dtype)
    values[at] = value
    return values


def prompts_with(value: float) -> torch.Tensor:
    prompts = torch.zeros(5, 6)
    prompts[4, 2] = value
    return prompts


IDS = torch.zeros(3, 4, dtype=torch.int64)
NOWHERE = torch.zeros(3, dtype=torch.int64, device="meta")
A, B = torch.randn(2, 4, 3), torch.randn(2, 3, 6)


def bad(argument: str, value: Any, error: type[Exception], message: str, **others: Any) -> Any:
    """One case; the start of the message is the same for all."""
    changes = {argument.partition("[")[0]: value, **others}
    argument = re.escape(argument)
    return pytest.param(
        changes, error, f"assemble: `{argument}` {message}", id=f"{argument} {describe_value(value)}"[:60]
    )


BAD = [
    # Not a tensor, or one of another rank, dtype or shape.
    bad("input_ids", [[1, 2]], TypeError, r"must be a tensor, got \[\[1, 2\]\] \(list\)"),
    bad("input_ids", np.zeros((3, 4)), TypeError, r"must be a tensor, got .*\(ndarray\)"),
    bad("input_ids", IDS[0], ValueError, r"must have shape \[B, T\], got int64 \[4\] on cpu"),
    bad("input_ids", IDS.float(), TypeError, r"must be int64 or int32, got float32 \[3, 4\]"),
    bad("input_ids", IDS.short(), TypeError, r"must be int64 or int32, got int16 \[3, 4\]"),
    bad("embedding", nn.Embedding(11, 6), TypeError, r"must be a tensor, got Embedding\(11, 6\)"),
    bad("embedding", None, TypeError, r"must be a tensor, got None"),
    bad("embedding", torch.randn(11), ValueError, r".*shape \[V, D\], got float32 \[11\]"),
    bad("embedding", torch.ones(11, 6, dtype=torch.int8), TypeError, r".*got int8 \[11, 6\]"),
    bad("prompts", [[0.0] * 6] * 5, TypeError, r"must be a tensor, got \[\["),
    bad("prompts", torch.randn(5, 1, 6), ValueError, r".*shape \[R, D\], got .*\[5, 1, 6\]"),
    bad("prompts", torch.randn(5, 6).half(), TypeError, r".*float32.*got float16 \[5, 6\]"),
    bad("prompts", torch.randn(5, 6).double(), TypeError, r".*float32.*got float64 \[5, 6\]"),
    bad("prompts", torch.randn(5, 7), ValueError, r".*hidden size 6, got float32 \[5, 7\]"),
    bad("attention_mask", [[1] * 4] * 3, TypeError, r"must be a tensor or None, got \[\["),
    bad("attention_mask", torch.ones(3, 5), ValueError, r".*\[3, 4\], got float32 \[3, 5\]"),
    bad("attention_mask", torch.ones(3, 1, 4, 4), ValueError, r".*got float32 \[3, 1, 4, 4\]"),
    bad("attention_mask", torch.ones(3, 4).cfloat(), TypeError, r".*got complex64"),
    bad(
        "attention_mask",
        torch.ones(3, 4).to(torch.float8_e4m3fn),
        TypeError,
        r"must be bool, integer or .*got float8_e4m3fn \[3, 4\]",
    ),
    bad("labels", IDS[:2], ValueError, r".*shape of input_ids \[3, 4\], got int64 \[2, 4\]"),
    bad("labels", IDS.float(), TypeError, r"must be int64 or int32, got float32 \[3, 4\]"),
    bad("labels", [1, 2], TypeError, r"must be a tensor or None, got \[1, 2\] \(list\)"),
    # Factors of an update of token vectors.
    bad(
        "token_factors", torch.randn(2, 4, 1), TypeError, r"must be a pair of tensors .*\[N, r, D\], or None, got float"
    ),
    bad("token_factors", ([[0.0]], [[0.0]]), TypeError, r"must be a pair of tensors .*, got \(\["),
    bad("token_factors", (A,), ValueError, r"must be a pair .*, got float32 \[2, 4, 3\] on cpu"),
    bad("token_factors", (A[0], B[0]), ValueError, r".*, got float32 \[4, 3\] on cpu and float32 \[3, 6\] on cpu"),
    bad("token_factors[0]", (A[:1], B), ValueError, r"must have a matrix for each of the 2 prompts, got .*\[1, 4, 3\]"),
    bad("token_factors[1]", (A, B[:1]), ValueError, r"must have a matrix for each of the 2 prompts, got .*\[1, 3, 6\]"),
    bad("token_factors[1]", (A, B[:, :2]), ValueError, r"must have the rank 3 of the first factor, got .*\[2, 2, 6\]"),
    bad("token_factors[1]", (A, B[..., 1:]), ValueError, r"must have the embedding's hidden size 6, got .*\[2, 3, 5\]"),
    bad("token_factors[0]", (A.half(), B), TypeError, r"must be float32 or .*\(torch.float32\), got float16"),
    bad("token_factors[1]", (A, B.to("meta")), ValueError, r"must be on the device of input_ids \(cpu\), got .* meta"),
    # Tensors on another device.
    bad("embedding", torch.randn(11, 6).to("meta"), ValueError, r".*device of input_ids \(cpu\), got .* meta"),
    bad("prompts", torch.randn(5, 6).to("meta"), ValueError, r".*device of input_ids \(cpu\), got .* meta"),
    bad("attention_mask", IDS.to("meta"), ValueError, r".*device of input_ids \(cpu\), got .* meta"),
    bad("labels", IDS.to("meta"), ValueError, r".*device of input_ids \(cpu\), got .* meta"),
    bad("prompt_offsets", NOWHERE, ValueError, r"must hold values .*int64 \[3\] on meta", layout="packed"),
    bad("prompt_ids", NOWHERE, ValueError, r"must hold values .*int64 \[3\] on meta", layout="packed"),
    bad("lengths", NOWHERE, ValueError, r"must hold values .*int64 \[3\] on meta", layout="packed"),
    # Token ids outside the vocabulary.
    bad("input_ids", filled(11, (1, 1), 0, torch.int64), IndexError, r"must be 0 to 10, got 11 at row 1, column 1"),
    bad("input_ids", filled(-1, (0, 3), 0, torch.int32), IndexError, r".*-1 at row 0, column 3"),
    bad("input_ids", filled(-100, (2, 0), 0, torch.int64), IndexError, r".*-100 at row 2, column 0"),
    bad("input_ids", IDS, IndexError, r".*got 0 at row 0, column 0", embedding=torch.randn(0, 6)),
    # Mask values that are neither 0 nor 1.
    bad("attention_mask", filled(2, (2, 1)), ValueError, r"must hold 1.*2.0 at row 2, column 1"),
    bad("attention_mask", filled(0.5, (0, 2)), ValueError, r".*got 0.5 at row 0, column 2"),
    bad("attention_mask", filled(NAN, (1, 0)), ValueError, r".*got nan at row 1, column 0"),
    bad("attention_mask", filled(-1, (1, 3), 0, torch.int8), ValueError, r".*-1 at row 1, column 3"),
    bad("attention_mask", filled(-INF, (0, 1), 0), ValueError, r".*-inf at row 0, column 1"),
    # Prompt offsets.
    bad("prompt_offsets", None, TypeError, r".*integers, got None"),
    bad("prompt_offsets", [], ValueError, r"must start with 0, got \[\]"),
    bad("prompt_offsets", [1, 3, 5], ValueError, r"must start with 0, got \[1, 3, 5\]"),
    bad("prompt_offsets", [0, 6, 5], ValueError, r"must ascend, got 5 after 6 .* 2: \[0"),
    bad("prompt_offsets", [0, 3, 4], ValueError, r".*rows of prompts \(5\), got 4"),
    bad("prompt_offsets", [0, 3.0, 5], TypeError, r".*integers, got \[0, 3.0, 5\]"),
    bad("prompt_offsets", torch.tensor([0.0, 3, 5]), TypeError, r".*integers, got float32 \[3\]"),
    bad("prompt_offsets", torch.zeros(1, 3).long(), ValueError, r".*got int64 \[1, 3\]"),
    # Prompt ids.
    bad("prompt_ids", None, ValueError, r"must be given because there are 2 prompts, got None"),
    bad("prompt_ids", [0, 1, 2], IndexError, r"must be -1 \(no prompt\) or 0 to 1, got 2 for row 2"),
    bad("prompt_ids", torch.tensor([0, -2, 1]), IndexError, r".*got -2 for row 1"),
    bad("prompt_ids", [0, 1], ValueError, r".*each of the 3 rows, got 2"),
    bad("prompt_ids", [0.0, 1.0, 1.0], TypeError, r".*integers, got \[0.0, 1.0, 1.0\]"),
    bad("prompt_ids", torch.tensor([True] * 3), TypeError, r".*integers, got bool \[3\]"),
    bad("prompt_ids", torch.zeros(3, 1).long(), ValueError, r".*one-dimensional.*got int64 \[3, 1\]"),
    bad("prompt_ids", 1, TypeError, r".*list of integers, got 1 \(int\)"),
    bad("prompt_ids", ["a", "b", "a"], TypeError, r".*integers, got \['a', 'b', 'a'\]"),
    # Lengths of the packed layout.
    bad("lengths", [4, 2], ValueError, r".*each of the 3 rows, got 2", layout="packed"),
    bad("lengths", [4, 5, 1], ValueError, r"must be 0 to T=4, got 5 for row 1", layout="packed"),
    bad("lengths", [4, -1, 1], ValueError, r"must be 0 to T=4, got -1 for row 1", layout="packed"),
    bad("lengths", [4, 1, 1], ValueError, r"must count .*, 2 in row 1, got 1", layout="packed"),
    bad("lengths", [4, 2, 3], ValueError, r"must count .*, 1 in row 2, got 3", layout="packed"),
    bad("lengths", [4.0, 2.0, 1.0], TypeError, r".*integers, got \[4.0", layout="packed"),
    # Room for prompts.
    bad("max_prompt_length", 1, ValueError, r"must be at least .*, got 1, .* row 0"),
    bad("max_prompt_length", -1, ValueError, r"must be at least 0, .*got -1"),
    bad("max_prompt_length", 3.5, TypeError, r"must be an int.*, got 3.5 \(float\)"),
    # Options.
    bad("layout", "ragged", ValueError, r"must be one of padded, packed, got 'ragged'"),
    bad("padding_side", "top", ValueError, r"must be one of left, right, got 'top'"),
    bad("mask_format", "4d", ValueError, r"must be one of none, 2d, 4d_bool, 4d_additive, got '4d'"),
    bad("mask_format", None, ValueError, r"must be one of .*, got None"),
    bad("sliding_window", 0, ValueError, r"must be at least 1, or None, got 0"),
    bad("sliding_window", -4, ValueError, r"must be at least 1, or None, got -4"),
    bad("sliding_window", 2.5, TypeError, r"must be an int.*, got 2.5 \(float\)"),
    bad("causal", "no", TypeError, r"must be a bool, got 'no' \(str\)"),
    bad("embedding_scale", "sqrt", TypeError, r"must be a number, got 'sqrt' \(str\)"),
    bad("embedding_scale", NAN, ValueError, r"must be finite, got nan"),
    bad("padding_idx", 11, ValueError, r"must be 0 to 10, or None, got 11"),
    bad("padding_idx", -1, ValueError, r"must be 0 to 10, or None, got -1"),
    bad("padding_idx", 1.0, TypeError, r"must be an int.*, got 1.0 \(float\)"),
    # Values of prompts.
    bad("prompts", prompts_with(NAN), ValueError, r".*finite, got nan at row 4, column 2", check_finite=True),
    bad("prompts", prompts_with(-INF), ValueError, r".*got -inf at row 4, column 2", check_finite=True),
]


def test_the_good_call_is_good(backend_name: str) -> None:
    """Otherwise the cases below could fail for another reason than the one they name."""
    call(lengths=[4, 2, 1], token_factors=(A, B), check=True)
    call(layout="packed", lengths=[4, 2, 1], check=True)


@pytest.mark.parametrize("native", [True, False], ids=["native", "twin"])
@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(
    backend_name: str, native: bool, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with using(backend.native_ops() if native else None), pytest.raises(error) as raised:
        call(**changes)
    assert type(raised.value) is error
    assert re.match(message, str(raised.value), re.DOTALL)


def test_a_long_value_is_shown_in_short(backend_name: str) -> None:
    with pytest.raises(TypeError, match="`input_ids`") as raised:
        call(input_ids=list(range(100_000)))
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "twin"])
def test_ids_at_padding_are_never_looked_at(backend_name: str, native: bool, layout: str) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    ids = torch.arange(12).view(3, 4) % 11
    embedding, prompts = torch.randn(11, 6), torch.randn(5, 6)
    with using(backend.native_ops() if native else None):
        clean, dirty = (
            call(input_ids=each, embedding=embedding, prompts=prompts, attention_mask=mask, layout=layout)
            for each in (ids, torch.where(mask == 1, ids, 2**40))
        )
    assert torch.equal(clean.inputs_embeds, dirty.inputs_embeds)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "twin"])
@pytest.mark.parametrize("bad", [-1, 11, 2**40, -(2**62)])
def test_without_checks_a_bad_id_gives_zeros(backend_name: str, native: bool, layout: str, bad: int) -> None:
    with using(backend.native_ops() if native else None):
        batch = call(input_ids=filled(bad, (1, 1), 3, torch.int64), layout=layout, check=False)
    vectors = batch.inputs_embeds.flatten(0, 1)
    slot = int(batch.token_slots[1, 1])
    assert not vectors[slot].any() and vectors[slot - 1].all()


@pytest.mark.parametrize("argument", ["prompt_offsets", "prompt_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_integers_that_stay_on_the_device_are_checked_too(backend_name: str, argument: str, dtype: torch.dtype) -> None:
    values = {"prompt_offsets": NOWHERE, "prompt_ids": NOWHERE} | {argument: NOWHERE.to(dtype)}
    ids, embedding, prompts = (torch.zeros(*shape, device="meta") for shape in ((3, 4), (11, 6), (5, 6)))
    with pytest.raises(TypeError, match=rf"`{argument}` must be .* integers, got \w+ \[3\] on meta"):
        spf.assemble(ids.long(), embedding, prompts, **values, max_prompt_length=3)
    with pytest.raises(ValueError, match=r"`prompt_ids` must have shape \[3\], got int64 \[2\] on meta"):
        spf.assemble(ids.long(), embedding, prompts, NOWHERE, NOWHERE[:2], max_prompt_length=3)
