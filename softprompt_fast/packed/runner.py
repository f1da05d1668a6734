"""Shared-prompt execution: each distinct prompt runs once per step, padding never, logits only where they are read.

In a causal decoder a prompt's hidden states do not depend on the text behind it. So one copy per step is enough, and
its gradient is exact: it flows back through the keys and values that all its rows read. Linear layers see one sequence
of useful tokens; only attention knows the layout (``shared_attention.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..base.errors import Unsupported
from ..base.modules import evaluating
from ..hf import architecture
from ..hf.architecture import check_architecture
from ..hf.attention import install, uninstall
from ..hf.embedding import embedding_table
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..tasks.encoding import IGNORED
from .batch import PackedInputs, SharedBatch, _updated, pack_rows
from .layout import PackedLayout
from .self_check import TOLERANCE, compare_with_rows_alone

logger = logging.getLogger("softprompt_fast")


@dataclass
class ExecutionReport:
    """How a model is executed, and why."""

    execution: str
    """"shared" or "padded"; of deep prompts, which have no padded form, "shared" or "refused"."""
    reason: str
    checked: dict[str, float]
    """Largest relative difference from each row alone, in the first training and the first inference batch."""


class PackedRunner:
    """Runs one model on packed batches; knows whether that is exact for it.

    Args:
        model: a causal language model of transformers.
        check: compare the first training and the first inference batch with each row run alone.
        shared_text: "auto": text that all rows of a prompt share at their start runs once too.
    """

    slack = 1.0
    """Times the tolerance of the comparison."""

    def __init__(self, model: Any, *, check: bool = True, shared_text: str | None = "auto") -> None:
        self.model = model
        self.check = check
        self.shared_text = shared_text
        self.unsupported: str | None = None
        self.checked: dict[str, float] = {}
        self._counted = False
        self._parameters = architecture.forward_parameters(model)
        try:
            check_architecture(model)
            install(model)
        except Unsupported as error:
            self.unsupported = str(error)

    def forward(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        prompt_ids: PromptIds,
        *,
        lengths: Sequence[int] | None,
        num_targets: int | None,
        return_logits: bool,
        loss_function: Callable[..., Tensor] | None,
        options: dict[str, Any],
    ) -> Any:
        """The model's output as :meth:`SoftPromptModel.forward` gives it; None: run the padded layout instead."""
        if labels is not None and labels.shape != input_ids.shape:
            shapes = f"{list(input_ids.shape)}, got {list(labels.shape)}"
            raise ValueError(f"`labels` must have the shape of input_ids {shapes}")
        batch = self.pack(
            bank, input_ids, attention_mask, prompt_ids, lengths
        )  # raises for bad input, before the check
        if not self._checked(bank, input_ids, attention_mask, prompt_ids):
            return None
        token_slots, previous = batch.token_slots.flatten(), batch.previous_slots.flatten()
        tokens = targets = token_slots[:0]  # places in the flattened input
        if return_logits:
            tokens = (token_slots >= 0).nonzero()[:, 0]
        if labels is not None:
            target = torch.where(previous >= 0, labels.flatten(), IGNORED)
            targets = _places(target != IGNORED, num_targets)
        read = torch.cat([token_slots[tokens], previous[targets]]).clamp(min=0)
        items = {k: v for k, v in options.items() if k == "num_items_in_batch"}
        passed = options if loss_function is None else {k: v for k, v in options.items() if k not in items}
        result = self._attempt(batch, read, passed)
        if result is None:
            return None
        output, logits = result
        if labels is not None:
            expected = torch.where(targets >= 0, target[targets], IGNORED)
            answers = logits[len(tokens) :]
            if loss_function is None:
                output["loss"] = self._loss(answers, expected, items)
            else:
                rows = targets.clamp(min=0) // max(1, input_ids.shape[1])
                output["loss"] = loss_function(answers, expected, rows, **items)
        output["logits"] = None
        if return_logits:
            every = logits.new_zeros(input_ids.numel(), logits.shape[-1])
            output["logits"] = every.index_copy(0, tokens, logits[: len(tokens)]).view(*input_ids.shape, -1)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(_of_tokens(x[0], batch.token_slots) for x in output["hidden_states"])
        return output

    def logits_behind(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor | None = None,
    ) -> Tensor | None:
        """[M, V] behind the tokens at `places` [M, 2] (row, column); None: [B, V] behind each row's last vector.

        Returns:
            None: run the padded layout instead.
        """
        batch = self.pack(bank, input_ids, attention_mask, prompt_ids, None)
        if not self._checked(bank, input_ids, attention_mask, prompt_ids):
            return None
        slots = batch.last_slots if places is None else batch.token_slots[places[:, 0], places[:, 1]]
        result = self._attempt(batch, slots.clamp(min=0), {})
        return None if result is None else result[1]

    def _attempt(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor] | None:
        """Runs the packed batch; None if the model did something that the packed layout does not stand for."""
        try:
            return self.run(batch, read, options)
        except Unsupported as error:
            self.give_up(str(error))
            return None

    def _loss(self, logits: Tensor, targets: Tensor, items: dict[str, Any]) -> Tensor:
        """The model's own loss; targets are shifted already."""
        vocabulary = self.model.config.get_text_config().vocab_size
        loss: Tensor = self.model.loss_function(
            logits=logits, labels=targets, vocab_size=vocabulary, shift_labels=targets, **items
        )
        return loss

    def _checked(
        self, bank: FastSoftPrompt, input_ids: Tensor, attention_mask: Tensor | None, prompt_ids: PromptIds
    ) -> bool:
        """Compares rows of the first training and the first inference batch with each row run alone, unpadded.

        Returns:
            False if the two differ, or the packed layout fails; it is given up then.
        """
        kind = "training" if torch.is_grad_enabled() else "inference"
        if not self.check or kind in self.checked or not input_ids.numel():
            return True
        try:
            # Without dropout there is one right answer, and no random number is drawn (a resumed run would lack it).
            with evaluating(self.model), evaluating(bank), parametrize.cached():
                difference = compare_with_rows_alone(self, bank, input_ids, attention_mask, prompt_ids)
        except Unsupported as error:
            self.give_up(str(error))
            return False
        except Exception as error:
            self.give_up(f"the packed layout failed: {type(error).__name__}: {error}")
            return False
        self.checked[kind] = difference
        weight = self.model.get_input_embeddings().weight
        device = weight.device.type
        rounded = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if getattr(self.model, "is_loaded_in_8bit", False):  # its products round to 8 bits and run in half precision
            rounded = torch.bfloat16
        tolerance = TOLERANCE[rounded] * self.slack
        if not difference <= tolerance:
            self.give_up(f"it differs from each row run alone by {difference:.1e} (rounding explains {tolerance:.0e})")
            return False
        return True

    def give_up(self, reason: str) -> None:
        """The padded layout from now on."""
        self.unsupported = reason
        uninstall(self.model)
        logger.warning("%s runs in the padded layout: %s", type(self.model).__name__, reason)

    def pack(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        lengths: Sequence[int] | None,
    ) -> SharedBatch:
        """The packed batch of rows [B, T] with their prompts."""
        return pack_rows(
            bank,
            self.model.get_input_embeddings(),
            input_ids,
            attention_mask,
            prompt_ids,
            lengths,
            fold=self.shared_text == "auto",
        )

    def run(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor]:
        """The model's output on a packed batch, and its logits [M, V] at the slots `read` [M].

        Raises:
            Unsupported: the model did something that the packed layout does not stand for.
        """
        layout = batch.layout
        output, logits = self.logits_at(
            read,
            inputs_embeds=batch.inputs_embeds,
            position_ids=batch.position_ids,
            attention_mask=layout.marker(batch.inputs_embeds.device),
            **options,
        )
        self._count_calls(layout)
        return output, logits

    def logits_at(self, places: Tensor, **inputs: Any) -> tuple[Any, Tensor]:
        """The model's output on a batch of one row, and its logits [M, V] at `places` [M], computed only there."""
        if "logits_to_keep" in self._parameters:
            output = self.model(**inputs, use_cache=False, logits_to_keep=places)
            return output, output.logits[0]
        output = self.model(**inputs, use_cache=False)
        return output, output.logits[0][places]

    def logits_alone(
        self,
        prompt: Tensor | None,
        input_ids: Tensor,
        places: Tensor,
        *,
        gradient: bool,
        update: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[M, V] at `places` [M] among the tokens [T] of a row that runs by itself, its prompt in front of it."""
        table = embedding_table(self.model.get_input_embeddings())
        vectors = table(input_ids) if update is None else _updated(table, input_ids, *update).to(table.weight.dtype)
        joined = vectors if prompt is None else torch.cat([prompt.to(vectors.dtype), vectors])
        if gradient and not joined.requires_grad:  # quantized layers take another way where none is asked for
            joined.requires_grad_()
        return self.logits_at(places + len(joined) - len(vectors), inputs_embeds=joined[None])[1]

    def _count_calls(self, layout: PackedLayout) -> None:
        """Every layer must have attended, with its window: what bypasses attention would see across rows."""
        if self._counted or not layout.slots:
            return
        config = self.model.config.get_text_config()
        layers = config.num_hidden_layers
        if layout.calls != layers:
            raise Unsupported(f"{layout.calls} attention calls in {layers} layers")
        types = getattr(config, "layer_types", None)
        windowed = "sliding_attention" in types if types else bool(getattr(config, "sliding_window", None))
        if windowed and not layout.windows:
            raise Unsupported("its sliding window does not reach the attention function")
        self._counted = True


def _places(wanted: Tensor, count: int | None) -> Tensor:
    """Places where `wanted` holds; with their number known nothing waits for a GPU, and -1 fills what is missing."""
    if count is None:
        return wanted.nonzero()[:, 0]
    return torch.nonzero_static(wanted, size=count, fill_value=-1)[:, 0]


def _of_tokens(states: Tensor, token_slots: Tensor) -> Tensor:
    """[K, D] -> [B, T, D], zeros at padding."""
    return torch.where(token_slots[..., None] >= 0, states[token_slots.clamp(min=0)], 0)
