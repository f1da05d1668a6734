"""The ``torch.autograd.Function`` of ``assemble``, and the choice between the native op and its twin."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..extension import backend
from ..extension.contract import AssembleCall, PlanColumn
from . import reference


def run(call: AssembleCall, padding_idx: int) -> tuple[Tensor, ...]:
    """The op's outputs, differentiable: natively if the backend has this device, else in plain PyTorch.

    Args:
        padding_idx: token whose embedding gets no gradient, or -1.
    """
    ops = backend.ops_for(call.prompts.device)
    if ops is None:
        return reference.assemble(_without_gradient_of(padding_idx, call))
    embedding, prompts, token_update = call.embedding, call.prompts, call.token_update
    if torch.is_grad_enabled() and (
        prompts.requires_grad or embedding.requires_grad or (token_update is not None and token_update.requires_grad)
    ):
        return _Assemble.apply(prompts, embedding, token_update, padding_idx, call)
    return ops.assemble(*call)


def _without_gradient_of(token: int, call: AssembleCall) -> AssembleCall:
    """The call with one token's embedding detached."""
    embedding = call.embedding
    if not 0 <= token < embedding.shape[0] or not embedding.requires_grad:
        return call
    frozen = torch.arange(embedding.shape[0], device=embedding.device)[:, None] == token
    return call._replace(embedding=torch.where(frozen, embedding.detach(), embedding))


def token_update(a: Tensor, b: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """The update that is added to the first tokens of a row.

    Args:
        a: [N, U, r]
        b: [N, r, D]
        tokens: T, the most tokens that a row can have.
        dtype: of the embedding.

    Returns:
        [N, min(U, T), D] in float64 if the embedding is, else float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    product: Tensor = _Product.apply(a[:, :tokens].to(wide), b.to(wide))
    return product


class _Assemble(torch.autograd.Function):
    """The native op with its gradient. Only the vectors have one."""

    @staticmethod
    def forward(
        ctx: Any,
        prompts: Tensor,
        embedding: Tensor,
        token_update: Tensor | None,
        padding_idx: int,
        call: AssembleCall,
    ) -> tuple[Tensor, ...]:
        # Not with `setup_context`: PyTorch would inspect its signature on every call, which takes longer than a small
        # batch.
        ops = backend.ops_for(prompts.device)
        assert ops is not None
        output = ops.assemble(*call)
        _, _, _, _, token_slots, prompt_slots, _, _ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward gets a tensor of zeros for each of the others
        ctx.prompt_rows, ctx.prompt_dtype = prompts.shape[0], prompts.dtype
        ctx.vocabulary, ctx.scale, ctx.padding_idx = embedding.shape[0], call.scale, padding_idx
        use_ids = call.prompt_ids
        if call.plan is not None:
            use_ids = call.plan[: call.prompt_segments, PlanColumn.PROMPT]
        ctx.update_shape = None if token_update is None else token_update.shape
        row_prompts = None if token_update is None else call.prompt_ids
        ctx.save_for_backward(prompt_slots, call.prompt_offsets, use_ids, call.input_ids, token_slots, row_prompts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        prompt_slots, prompt_offsets, use_ids, input_ids, token_slots, row_prompts = ctx.saved_tensors
        ops = backend.ops_for(grad.device)
        assert ops is not None
        for_prompts = for_embedding = for_update = None
        if ctx.needs_input_grad[0]:
            if use_ids is not None:
                use_ids = use_ids.contiguous()  # a column of the plan; here, so that the forward pass is one launch
            for_prompts = ops.prompt_backward(
                grad, prompt_slots, use_ids, prompt_offsets, ctx.prompt_rows, ctx.prompt_dtype
            )
        if ctx.needs_input_grad[1]:
            for_embedding = ops.embedding_backward(
                grad, input_ids, token_slots, ctx.vocabulary, ctx.padding_idx, ctx.scale, grad.dtype
            )
        if ctx.needs_input_grad[2]:
            prompts, reach, _ = ctx.update_shape
            known = (input_ids >= 0) & (input_ids < ctx.vocabulary)  # other tokens are zeros
            rows = _update_rows(token_slots, known, row_prompts, prompts, reach)
            wide = torch.promote_types(grad.dtype, torch.float32)
            for_update = ops.embedding_backward(grad, rows, token_slots, prompts * reach, -1, 1.0, wide)
            for_update = for_update.view(ctx.update_shape)
        return for_prompts, for_embedding, for_update, None, None


def _update_rows(token_slots: Tensor, known: Tensor, row_prompts: Tensor | None, prompts: int, reach: int) -> Tensor:
    """[B, T]: which row of a token update [N, U, D], seen as [N * U, D], a token got; N * U for none."""
    placed = token_slots >= 0
    rank = placed.cumsum(1) - 1
    first: Tensor | int = 0 if prompts else -1
    if row_prompts is not None:
        first = row_prompts[:, None]
    updated = placed & known & (rank < reach) & (first >= 0) & (first < prompts)
    return torch.where(updated, first * reach + rank, prompts * reach)


class _Product(torch.autograd.Function):
    """[N, U, r] @ [N, r, D] in the factors' own dtype, forward and backward, under autocast too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with _without_autocast(a.device.type):
            return torch.bmm(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with _without_autocast(a.device.type):
            for_a = torch.bmm(grad, b.transpose(1, 2)) if ctx.needs_input_grad[0] else None
            for_b = torch.bmm(a.transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
        return for_a, for_b


def _without_autocast(device_type: str) -> Any:
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()
