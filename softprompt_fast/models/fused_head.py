"""Log-probabilities of labels in place of logits, as TRL's trainers ask for them.

TRL puts a forward of its own in front of a model's. Called with ``fused_lm_head=True``, it runs the model's body and
then its head, which would leave the prompts out. A :class:`TakesFusedHead` keeps its forward and takes TRL's settings.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks.encoding import IGNORED

ARGUMENT = "fused_lm_head"
"""The argument of a call that asks for log-probabilities."""
ROWS_AT_ONCE = 256
"""Rows of logits that are converted to float32 together, which bounds the memory this takes."""


@dataclass(frozen=True)
class FusedHead:
    """What TRL asks for: the arguments of its ``add_fused_lm_head``."""

    temperature: float
    """Logits are divided by it."""
    outputs: tuple[str, ...]
    """Fields that are wanted."""

    @classmethod
    def of(cls, forward: object) -> FusedHead | None:
        """The settings of the forward that TRL put in front of a model's; None: it is another function."""
        function = getattr(forward, "__func__", None)
        code = getattr(function, "__code__", None)
        if code is None or ARGUMENT not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            return None
        assert function is not None
        settings = inspect.getclosurevars(function).nonlocals
        missing = [name for name in ("temperature", "outputs") if name not in settings]
        if missing:
            raise TypeError(f"this version of TRL is not supported: its forward has no setting `{missing[0]}`")
        return cls(float(settings["temperature"]), tuple(settings["outputs"]))


class TakesFusedHead(nn.Module):
    """A module whose forward itself answers calls with ``fused_lm_head=True``."""

    fused_head: FusedHead | None = None
    """What TRL has told this module; None: nothing yet."""

    def __setattr__(self, name: str, value: Any) -> None:
        head = FusedHead.of(value) if name == "forward" else None
        if head is None:
            super().__setattr__(name, value)
        else:
            vars(self)["fused_head"] = head


def answer(
    model: Any, labels: Tensor | None, *, num_items_in_batch: Any = None, head: FusedHead | None = None, **inputs: Any
) -> Any:
    """TRL's output: per-token fields [B, T], each at the column of its label, and zero where there is none.

    Args:
        model: a SoftPromptModel; `inputs` are arguments of its forward.
        labels: [B, T]; -100: none.
        num_items_in_batch: what the sum of losses is divided by; None: the number of labels that are predicted.
        head: None: what TRL told this model, or the base of an accelerated PEFT model.

    Raises:
        ValueError: labels are missing or shifted, or TRL has told neither.
    """
    head = head or model.fused_head or FusedHead.of(vars(model.base_model).get("forward"))
    if head is None:
        raise ValueError(f"`{ARGUMENT}` cannot be given: TRL's `add_fused_lm_head` was not called")
    from trl.trainer.utils import FusedCausalLMOutput

    if inputs.pop("shift_labels", None) is not None:
        raise ValueError("`shift_labels` cannot be given: rows that are split across devices cannot follow prompts")
    if not isinstance(labels, Tensor):
        raise ValueError(f"`labels` must be given with `{ARGUMENT}`, got {type(labels).__name__}")
    # Each label is replaced by its own place, so that the runner says which labels it has predicted.
    every = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
    fields: dict[str, Any] = {}

    def loss_function(logits: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        log_probs, entropy, *others = _Scores.apply(
            logits, labels.flatten()[places], 1 / head.temperature, "entropy" in head.outputs
        )
        values = {"log_probs": log_probs, "entropy": entropy, "label_mask": torch.ones_like(places, dtype=torch.bool)}
        values |= zip(("log_sum_sq_probs", "mean_logits", "is_top1"), others, strict=True)
        for name, value in values.items():
            if name in (*head.outputs, "log_probs", "label_mask"):
                empty = torch.zeros(labels.numel(), dtype=value.dtype, device=value.device)
                fields[name] = empty.index_put((places,), value).view(labels.shape)
        count = max(1, len(places)) if num_items_in_batch is None else num_items_in_batch
        loss: Tensor = -log_probs.sum() / count
        return loss

    output = type(model).forward(
        model,
        labels=every.masked_fill(labels == IGNORED, IGNORED),
        loss_function=loss_function,
        return_logits=False,
        **inputs | {"return_dict": True},
    )
    return FusedCausalLMOutput(loss=output.loss, aux_loss=output.get("aux_loss"), **fields)


class _Scores(torch.autograd.Function):
    """Facts about the distributions of logits [M, V] and their targets [M], each [M].

    Only the logits are kept for the backward pass. Gradients flow through log-probabilities and entropies.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, targets: Tensor, factor: float, with_entropy: bool
    ) -> tuple[Tensor, ...]:
        parts = []
        for rows, target in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
            values = _full(rows) * factor
            total = values.logsumexp(1)
            chosen = values.gather(1, target[:, None])[:, 0]
            expected = (values.sub(total[:, None]).exp() * values).sum(1) if with_entropy else total
            squares = (2 * values).logsumexp(1) - 2 * total
            parts.append((chosen - total, total - expected, squares, values.mean(1), values.argmax(1) == target))
        log_probs, entropy, squares, mean, top = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, entropy)
        ctx.factor = factor
        ctx.mark_non_differentiable(squares, mean, top)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, squares, mean, top

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, entropy = ctx.saved_tensors
        of_log_probs, of_entropy = gradients[:2]
        result = torch.empty_like(logits)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_p = (_full(logits[rows]) * ctx.factor).log_softmax(1)
            gradient = torch.zeros_like(log_p)
            if of_log_probs is not None:
                gradient -= log_p.exp() * of_log_probs[rows, None]
                gradient.scatter_add_(1, targets[rows, None], of_log_probs[rows, None])
            if of_entropy is not None:
                gradient -= log_p.exp() * (log_p + entropy[rows, None]) * of_entropy[rows, None]
            result[rows] = gradient * ctx.factor
        return result, None, None, None


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
