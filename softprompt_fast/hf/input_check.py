"""Runs a model on a few tokens: vectors must give what ids give, and a row beside a longer one what it gives alone."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..base.modules import evaluating
from .architecture import ForwardTraits, answers_spans, check_no_input_prompt, classifies_rows, with_pad_token
from .embedding import LOOKUP_SCALE, check_whole, token_vectors, vectors_like, vocabulary_size

COMPARED_TOKENS = 4
PADDING_TOLERANCE = 0.05
"""Only rounding may differ between a row alone and beside a longer one; models that read the padding differ by more."""


def check_inputs(model: Any, *, run_sharded: bool = True) -> None:
    """Checks once per base model that prompts and padding leave its rows as they are; finds the scale of its look-up.

    A model such as Pegasus multiplies embeddings by a constant if it is given ids, and not if it is given vectors.
    :func:`embedding_table` of the model's embedding module then has that scale too. The model runs on four tokens, a
    few times, without gradients and dropout; the random state does not change.

    Args:
        model: a transformers model; every rank of a sharded one must call this.
        run_sharded: False: a sharded model is left to a later call, because running it settles how it is sharded.

    Raises:
        TypeError: the model does something else with embeddings that it looks up, padding changes its results, or a
            prompt of PEFT stands in front of its input.
    """
    check_no_input_prompt(model)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, LOOKUP_SCALE) or not isinstance(embedding, nn.Module):
        return
    check_whole(model)
    like = vectors_like(embedding)
    if like.device.type == "meta":
        return  # there is nothing to run; embedding_table refuses it
    if not run_sharded and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return
    ids = _ordinary_ids(model, vocabulary_size(embedding)).to(like.device)[None]
    extra = _other_inputs(model, ids)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    context = with_pad_token(model.config) if classifies_rows(model) else nullcontext()
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices), _not_compiled(), context:
        vectors = token_vectors(embedding, ids)
        try:
            expected = _run(model, input_ids=ids, **extra)
        except Exception:  # ids alone are no input of this model, so there is nothing to be equal to
            setattr(embedding, LOOKUP_SCALE, 1.0)
            return
        scale = _lookup_scale(model, vectors, expected, extra)
        rows = expected.dim() == 3 or answers_spans(model) or classifies_rows(model)
        if rows and not getattr(model, "is_quantized", False):  # 8-bit products depend on the batch
            _check_padding(model, vectors * scale, extra)
    setattr(embedding, LOOKUP_SCALE, scale)


def _lookup_scale(model: Any, vectors: Tensor, expected: Tensor, extra: dict[str, Any]) -> float:
    """The constant times which the vectors [1, T, D] of ids give what the ids gave."""
    name = type(model).__name__
    differences: dict[float, float] = {}
    for scale in (1.0, *_scales(model, vectors.shape[-1])):
        try:
            got = _run(model, inputs_embeds=vectors * scale, **extra)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            raise TypeError(
                f"{name} cannot use a prompt: it runs on input_ids but not on inputs_embeds ({reason})"
            ) from error
        differences[scale] = _difference(got, expected)
        if differences[scale] == 0.0:
            return scale
    nearest = min(differences, key=lambda key: differences[key])
    allowed = 4 * torch.finfo(expected.dtype).eps ** 0.5
    if not differences[nearest] <= allowed:
        raise TypeError(
            f"{name} cannot use a prompt: it treats embeddings that it looks up in a way of its own. "
            f"Its logits for token ids differ from its logits for their vectors by {differences[1.0]:.1e}, "
            f"more than the tolerance {allowed:.0e}"
        )
    return nearest


def _check_padding(model: Any, vectors: Tensor, extra: dict[str, Any]) -> None:
    """Compares half of a row [1, T, D] with the same half, padded, beside the whole row.

    The padding is where batches have it: on the left of a decoder that classifies rows, else on the right.
    """
    tokens = vectors.shape[1]
    half = tokens // 2
    mask = torch.ones(2, tokens, dtype=torch.int64, device=vectors.device)
    mask[1, half:] = 0
    row = torch.arange(tokens, device=vectors.device)
    both = torch.cat([vectors, vectors * mask[1, :, None]])
    twice = {key: value.repeat(2, 1) if isinstance(value, Tensor) else value for key, value in extra.items()}
    traits = ForwardTraits.of(model)
    if traits.pools_last_token:
        mask[1], both[1] = mask[1].flip(0), both[1].roll(half, 0)
        if "position_ids" in traits.parameters:
            twice["position_ids"] = torch.stack([row, (row - half).clamp(min=0)])
    alone = _run(model, inputs_embeds=vectors[:, :half], attention_mask=mask[:1, :half], **extra)
    together = _run(model, inputs_embeds=both, attention_mask=mask, **twice)[1]
    difference = _difference(together if traits.classifies_rows else together[: alone.shape[1]], alone[0])
    if not difference <= PADDING_TOLERANCE:
        raise TypeError(
            f"{type(model).__name__} cannot use prompts in batches: a row beside a longer one differs from the row "
            f"alone by {difference:.1e} of its largest number, although the attention mask leaves out the padding"
        )


def _run(model: Any, **inputs: Tensor) -> Tensor:
    torch.manual_seed(0)  # some models draw random numbers when they are evaluated too
    output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            named: Tensor = output[name]
            return named
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    first: Tensor = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    return first


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite if a number is not finite."""
    if torch.equal(got, expected):
        return 0.0
    difference = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return difference.item() if difference.isfinite() else math.inf


def _other_inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.arange(3, 3 + ids.shape[1], device=ids.device)[None]
    return inputs


def _ordinary_ids(model: Any, count: int) -> Tensor:
    """A few token ids spread over a vocabulary of `count`, without those that the configuration gives a meaning."""
    special = set(_special_ids(model.config.to_dict()))
    start = max(0, count // 8)
    found = [token for token in range(start, count) if token not in special]
    if len(found) < COMPARED_TOKENS:
        found = list(range(count))
    step = max(1, len(found) * 3 // 4 // COMPARED_TOKENS)
    return torch.tensor(found[: step * COMPARED_TOKENS : step])


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif isinstance(name, str) and name.endswith(("_id", "_ids", "_index")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _scales(model: Any, width: int) -> list[float]:
    """Constants by which the model may multiply embeddings that it looks up."""
    found = [math.sqrt(width)]
    for module in model.modules():
        for name, value in vars(module).items():
            if "scale" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append(float(value))
    return [scale for scale in dict.fromkeys(found) if scale not in (0.0, 1.0) and math.isfinite(scale)][:8]


def _not_compiled() -> AbstractContextManager[Any]:
    """Runs a compiled model as it was written: four tokens are not worth compiling for."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
