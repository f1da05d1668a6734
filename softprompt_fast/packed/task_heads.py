"""Shared-prompt execution for decoders that classify rows, tag tokens or answer questions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hf import architecture
from ..hf.architecture import returning_mappings
from ..hf.attention import InstalledAttention
from ..hf.cpu_linear import faster_products
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..tasks.encoding import IGNORED
from .batch import PackedInputs, SharedBatch
from .cuda_graphs import StepGraphs
from .runner import (
    PACKED_OPTIONS,
    PackedRunner,
    at_places,
    failures_of_the_model,
    packed_types,
    read_once,
    slots_of_columns,
)
from .spans import LOGITS, POSITIONS, end_loss


class TaskHeadRunner(PackedRunner):
    """Runs one decoder with a task head on packed batches.

    A row is classified by its last vector, so the head reads one slot per row. The other heads read each token's slot.

    Args:
        model, check, shared_text: as for :class:`PackedRunner`.
    """

    task_head = True
    options = frozenset({*PACKED_OPTIONS, *POSITIONS})

    def __init__(
        self, model: Any, *, check: bool = True, shared_text: str | None = "auto", cuda_graphs: bool = False
    ) -> None:
        super().__init__(model, check=check, shared_text=shared_text, cuda_graphs=False)
        self._classifies = architecture.is_named(self.model, "ForSequenceClassification")
        self._spans = set(POSITIONS) <= self._parameters
        needed = ("score", self.model.base_model_prefix)
        self._decoder: Decoder | None = None
        if self._classifies and any(getattr(self.model, name, None) is None for name in needed):
            self.unsupported = self.unsupported or "its head is not a layer `score` after the decoder"
        elif self._classifies and cuda_graphs and self.unsupported is None:
            self.graphs = StepGraphs()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_decoder": None}

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
        embedding: Any = None,
        prompt_columns: int = 0,
    ) -> Any:
        """The model's output as :meth:`SoftPromptModel.forward` returns it; arguments as :meth:`PackedRunner.forward`.

        Args:
            labels: [B] or [B, C] of rows; [B, T] of tokens.
            options: also ``start_positions`` and ``end_positions`` [B].
            num_targets, return_logits: not read. These heads cost little.
        """
        if loss_function is not None:
            raise ValueError("`loss_function` cannot be given because this model's labels are not tokens of a text")
        options = dict(options)
        options.pop("num_items_in_batch", None)  # most of transformers' losses of these heads do not read it
        positions = [options.pop(name, None) for name in POSITIONS]
        types = options.pop("token_type_ids", None)
        selection = bank.select(prompt_ids, len(input_ids))
        fold = None if types is None else False
        batch = self.pack(selection, input_ids, attention_mask, lengths, embedding=embedding, fold=fold)
        if types is not None:
            options["token_type_ids"] = packed_types(types, batch)
        prompts, columns = _prompt_slots(batch, selection.prefixes), slots_of_columns(batch, prompt_columns)
        if prompt_columns:  # all of a prompt costs no more here than its last vector
            columns = torch.cat([prompts, columns[:, prompt_columns:]], 1)
        with failures_of_the_model():
            self._check(bank, input_ids, attention_mask, prompt_ids, embedding)
            if self._classifies:
                output, logits = self.run(batch, batch.last_slots.clamp(min=0), options)
                output["logits"] = logits.masked_fill((batch.last_slots < 0)[:, None], 0)
            else:
                # A softmax over where an answer begins includes the places of the whole prompt.
                seen = torch.cat([prompts, columns], 1) if self._spans else columns
                read, places = read_once(columns.new_zeros(0), seen, batch.layout.slots)
                output, logits = self.run(batch, read, options)
                numbers = at_places(logits, places)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(at_places(x[0], columns) for x in output["hidden_states"])
        if self._classifies:
            if labels is not None:
                output["loss"] = self._row_loss(output["logits"], labels)
        elif self._spans:
            self._set_spans(output, numbers, seen, columns.shape[1], batch, positions)
        else:
            output["logits"] = numbers
            if labels is not None:
                output["loss"] = self._token_loss(output["logits"], labels, batch)
        return output

    def logits_at(self, places: Tensor, **inputs: Any) -> tuple[Any, Tensor]:
        """The model's output on a batch of one row, and the head's numbers [M, C] at `places` [M]."""
        if self._classifies:
            output, states = self.states_at(places, **inputs)
            return output, self.model.score(states)
        if "use_cache" in self._parameters or not self._spans:
            inputs["use_cache"] = False
        slots = inputs["inputs_embeds"].shape[1]
        with returning_mappings(self.model.config), faster_products(self.model, slots):
            output = self.model(**inputs)
        if self._spans:
            return output, torch.stack([output[name][0, places] for name in LOGITS], -1)
        return output, output.logits[0, places]

    def states_at(self, places: Tensor, **inputs: Any) -> tuple[Any, Tensor]:
        """The output of a model that classifies rows, and the decoder's states [M, D] at `places` [M]."""
        inputs["use_cache"] = False
        slots = inputs["inputs_embeds"].shape[1]
        with returning_mappings(self.model.config), faster_products(self.model, slots):
            decoded = getattr(self.model, self.model.base_model_prefix)(**inputs)
        return _classifier_output(decoded), decoded.last_hidden_state[0, places]

    def _replayed(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor] | None:
        if self.graphs is None:
            return None
        if self._decoder is None:
            self._decoder = Decoder(self)
        replayed = self.graphs.run(self._decoder, batch, read, options)
        return None if replayed is None else (replayed[0], self.model.score(replayed[1]))

    def logits_alone(
        self,
        prompt: Tensor | None,
        input_ids: Tensor,
        places: Tensor,
        *,
        gradient: bool,
        update: tuple[Tensor, Tensor] | None = None,
        embedding: Any = None,
    ) -> Tensor:
        """As :meth:`PackedRunner.logits_alone`. Rows are classified by the model's own forward, at their last token."""
        if not self._classifies:
            return super().logits_alone(
                prompt, input_ids, places, gradient=gradient, update=update, embedding=embedding
            )
        return torch.cat([self._row_alone(prompt, input_ids[: place + 1], update, embedding) for place in places])

    def _row_alone(
        self, prompt: Tensor | None, input_ids: Tensor, update: tuple[Tensor, Tensor] | None, embedding: Any
    ) -> Tensor:
        """[1, C], a row's logits by the model's own forward."""
        vectors = self.vectors_alone(prompt, input_ids, update, embedding)
        with returning_mappings(self.model.config):
            logits: Tensor = self.model(inputs_embeds=vectors[None], use_cache=False).logits
        return logits

    # --- losses, as transformers computes them ---

    def _row_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        from transformers.loss.loss_utils import ForSequenceClassificationLoss

        loss: Tensor = ForSequenceClassificationLoss(labels, logits, self.model.config)
        return loss

    def _token_loss(self, logits: Tensor, labels: Tensor, batch: SharedBatch) -> Tensor:
        from transformers.loss.loss_utils import ForTokenClassification

        columns = logits[:, logits.shape[1] - labels.shape[1] :].contiguous()
        known = labels.masked_fill(batch.token_slots < 0, IGNORED)
        loss: Tensor = ForTokenClassification(columns, known, self.model.config)
        return loss

    def _set_spans(
        self,
        output: Any,
        numbers: Tensor,
        seen: Tensor,
        width: int,
        batch: SharedBatch,
        positions: Sequence[Tensor | None],
    ) -> None:
        """Gives the output its logits [B, P + T] of both ends, the smallest number at padding, and its loss.

        Args:
            numbers: [B, X, 2] at the slots `seen` [B, X], of which the last `width` columns are the output's.
        """
        tokens = batch.token_slots.shape[1]
        places = torch.arange(seen.shape[1] - tokens, seen.shape[1], device=seen.device).expand(len(seen), -1)
        smallest = torch.finfo(numbers.dtype).min
        padding = F.pad(batch.token_slots < 0, (width - tokens, 0), value=False)
        # The column before a row's first token shows the prompt's last vector once more: it is no place of its own.
        texts = F.pad(batch.token_slots >= 0, (width - tokens, 0), value=False)
        own = torch.cat([seen[:, : seen.shape[1] - width] >= 0, texts], 1)
        losses = []
        for end, (name, position) in enumerate(zip(LOGITS, positions, strict=True)):
            output[name] = numbers[:, -width:, end].masked_fill(padding, smallest) if width else numbers[:, :0, end]
            if position is not None:
                losses.append(end_loss(numbers[..., end], own, position, batch.token_slots, places))
        if len(losses) == 2:
            output["loss"] = (losses[0] + losses[1]) / 2


class Decoder:
    """The decoder below a head that classifies rows, as CUDA graphs see it. A head is trained, so it stays out."""

    def __init__(self, runner: TaskHeadRunner) -> None:
        self._owner = weakref.ref(runner)  # which owns this
        self.check, self.slack = runner.check, runner.slack

    @property
    def _runner(self) -> TaskHeadRunner:
        runner = self._owner()
        assert runner is not None
        return runner

    @property
    def model(self) -> Any:
        model = self._runner.model
        return getattr(model, model.base_model_prefix)

    def make_ready(self) -> InstalledAttention:
        return self._runner.make_ready()

    def run_once(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor]:
        return self._runner.run_once(batch, read, options, self._runner.states_at)


def _prompt_slots(batch: SharedBatch, prefixes: Sequence[tuple[int, int]]) -> Tensor:
    """[B, P], the slots of each row's prompt; -1: it has fewer than the longest.

    Args:
        prefixes: [B], the second number is the length of the row's prompt.
    """
    first = torch.tensor([slot for *_, slot, _ in batch.layout.rows.lines], dtype=torch.int64)[:, None]
    length = torch.tensor([length for _, length in prefixes], dtype=torch.int64)[:, None]
    place = torch.arange(int(length.max()) if len(length) else 0)
    return torch.where(place < length, first + place, -1).to(batch.token_slots.device)


def _classifier_output(decoded: Any) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    return SequenceClassifierOutputWithPast(
        hidden_states=decoded.get("hidden_states"), attentions=decoded.get("attentions")
    )
