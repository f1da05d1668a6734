"""Shared-prompt execution: each distinct prompt runs once per step, padding never, logits only where they are read.

In a causal decoder a prompt's hidden states do not depend on the text after it. So one copy per step is enough. The
prompt's gradient is exact: it flows back through the keys and values that all its rows read. Linear layers see one
sequence of useful tokens; only attention knows the layout (``packed/attention.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from ..base.compiling import outside_of_graphs
from ..base.errors import PackedFailure, Unsupported
from ..base.modules import evaluating
from ..hf import architecture
from ..hf.architecture import check_architecture, check_room, returning_mappings
from ..hf.attention import InstalledAttention, installed_attention
from ..hf.cpu_linear import faster_products
from ..hf.embedding import embedding_table, looked_up
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..prompts.selection import Selection
from ..tasks.encoding import IGNORED
from .batch import PackedInputs, SharedBatch, pack_rows, updated_embeddings
from .cuda_graphs import StepGraphs
from .layout import PackedLayout
from .self_check import checked_rows, compare_with_rows_alone, exact_products, tolerance

logger = logging.getLogger("softprompt_fast")
PACKED_OPTIONS = {"output_hidden_states", "num_items_in_batch", "token_type_ids"}
"""Options of a model's forward that the packed layout can run with."""


@dataclass
class ExecutionReport:
    """How a model is executed, and why."""

    execution: str
    """"shared" or "padded"; "shared" or "refused" for deep prompts, which have no padded layout."""
    reason: str
    checked: dict[str, float]
    """Largest relative difference from each row run alone, in the first training and the first inference batch."""


class PackedRunner:
    """Runs one model on packed batches, where that is exact; :attr:`unsupported` is the reason where it is not.

    Args:
        model: a causal language model of transformers, or a PEFT model of one.
        check: compare the first training and the first inference batch with each row run alone.
        shared_text: "auto": text that all rows of a prompt share at their start also runs once.
        cuda_graphs: on a GPU, run batches of sizes that come again as CUDA graphs.
    """

    slack = 1.0
    """Factor on the tolerance of the check."""
    task_head = False
    """Whether the model's head is not a language model's."""
    options = frozenset(PACKED_OPTIONS)
    """Options of the model's forward that packed batches can run with."""

    def __init__(
        self, model: Any, *, check: bool = True, shared_text: str | None = "auto", cuda_graphs: bool = True
    ) -> None:
        self.model = architecture.without_adapters(model)
        self.check = check
        self.shared_text = shared_text
        self.graphs = StepGraphs() if cuda_graphs else None
        self.unsupported: str | None = None
        self.checked: dict[str, float] = {}
        self.context_length = architecture.context_length(model)
        self.first_position = architecture.first_position(model)
        self._attention: InstalledAttention | None = None
        self._parameters = architecture.forward_parameters(model)
        try:
            check_architecture(model, task_head=self.task_head)
            self.make_ready()
        except Unsupported as error:
            self.unsupported = str(error)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_attention": None}  # another process, or a copy of the model, installs its own

    def make_ready(self) -> InstalledAttention:
        """Installs the attention that packed batches need, also after another implementation was set.

        Raises:
            Unsupported: packed batches were given up, or the implementation set now cannot be replaced.
        """
        if self.unsupported is not None:
            raise Unsupported(self.unsupported)
        if self._attention is None:
            self._attention = installed_attention(self.model)
        self._attention.ensure()
        return self._attention

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
        """The model's output as :meth:`SoftPromptModel.forward` returns it.

        Args:
            options: of the model's forward, out of PACKED_OPTIONS; ``token_type_ids`` [B, T].
            embedding: the table [V, D] or module that gives the tokens' vectors; None: the model's.
            prompt_columns: P, columns of prompts in front of logits and hidden states. Of a prompt only its last vector
                has numbers, in the column before its row's first token.

        Raises:
            Unsupported: the model cannot run this batch exactly in the packed layout.
            PackedFailure: the model raised another error.
        """
        options = dict(options)
        types = options.pop("token_type_ids", None)
        fold = None if types is None else False  # equal tokens may differ in their type
        selection = bank.select(prompt_ids, len(input_ids))
        batch = self.pack(selection, input_ids, attention_mask, lengths, embedding=embedding, fold=fold)
        if types is not None:
            options["token_type_ids"] = packed_types(types, batch)
        with failures_of_the_model():
            self._check(bank, input_ids, attention_mask, prompt_ids, embedding)
        previous = batch.previous_slots.flatten()
        targets = previous[:0]  # places in the flattened input
        if labels is not None:
            target = torch.where(previous >= 0, labels.flatten(), IGNORED)
            targets = _places(target != IGNORED, num_targets)
        answered = previous[targets].clamp(min=0)
        read = places = answered
        if return_logits:
            read, places = read_once(answered, slots_of_columns(batch, prompt_columns), batch.layout.slots)
        items = {k: v for k, v in options.items() if k == "num_items_in_batch"}
        passed = options if loss_function is None else {k: v for k, v in options.items() if k not in items}
        with failures_of_the_model():
            output, logits = self.run(batch, read, passed)
        if labels is not None:
            expected = torch.where(targets >= 0, target[targets], IGNORED)
            answers = logits[: len(targets)]
            if loss_function is None:
                output["loss"] = self._loss(answers, expected, items)
            else:
                rows = targets.clamp(min=0) // max(1, input_ids.shape[1])
                output["loss"] = loss_function(answers, expected, rows, **items)
        output["logits"] = at_places(logits, places) if return_logits else None
        if output.get("hidden_states") is not None:
            columns = slots_of_columns(batch, prompt_columns)
            output["hidden_states"] = tuple(at_places(x[0], columns) for x in output["hidden_states"])
        return output

    def logits_after(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor | None = None,
        embedding: Any = None,
    ) -> Tensor:
        """[M, V] after the tokens at `places` [M, 2] (row, column); None: [B, V] after each row's last vector.

        Raises:
            Unsupported: the model cannot run this batch exactly in the packed layout.
            PackedFailure: the model raised another error.
        """
        selection = bank.select(prompt_ids, len(input_ids))
        batch = self.pack(selection, input_ids, attention_mask, None, embedding=embedding)
        slots = batch.last_slots if places is None else batch.token_slots[places[:, 0], places[:, 1]]
        with failures_of_the_model():
            self._check(bank, input_ids, attention_mask, prompt_ids, embedding)
            return self.run(batch, slots.clamp(min=0), {})[1]

    def _loss(self, logits: Tensor, targets: Tensor, items: dict[str, Any]) -> Tensor:
        """The model's own loss; targets are shifted already."""
        vocabulary = self.model.config.get_text_config().vocab_size
        loss: Tensor = self.model.loss_function(
            logits=logits, labels=targets, vocab_size=vocabulary, shift_labels=targets, **items
        )
        return loss

    @outside_of_graphs
    def _check(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        embedding: Any,
    ) -> None:
        """Compares rows of the first training and the first inference batch with each row run alone, unpadded.

        Raises:
            Unsupported: the two differ.
        """
        kind = "training" if torch.is_grad_enabled() else "inference"
        if not self.check or kind in self.checked or not input_ids.numel():
            return
        # Without dropout there is one right answer, and no random number is drawn (a resumed run would lack it).
        # Products that the user lets PyTorch round would hide differences.
        with evaluating(self.model), evaluating(bank), parametrize.cached(), exact_products(self.model):
            rows = checked_rows(len(input_ids))
            selection = bank.select(prompt_ids, len(input_ids)).of_rows(rows)
            mask = None if attention_mask is None else attention_mask[rows]
            batch = self.pack(selection, input_ids[rows], mask, None, embedding=embedding)
            difference = compare_with_rows_alone(
                lambda slots: self.run(batch, slots, {})[1],
                partial(self.logits_alone, embedding=embedding),
                selection,
                input_ids[rows],
                batch.token_slots,
            )
            allowed = tolerance(self.model, self.slack)
        if not difference <= allowed:
            self.checked[kind] = difference
            reason = f"packed logits differ from row-by-row logits by {difference:.1e}"
            raise Unsupported(f"{reason}, more than the tolerance {allowed:.0e}")
        self.checked[kind] = difference

    def stop(self, reason: str) -> None:
        """Stops using the packed layout. The model keeps the installed attention while others use it."""
        self.unsupported = reason
        self._attention = None
        if self.graphs is not None:
            self.graphs.close()

    def give_up(self, reason: str) -> None:
        """Stops using the packed layout, and logs why."""
        self.stop(reason)
        logger.warning("%s runs in the padded layout: %s", type(self.model).__name__, reason)

    @outside_of_graphs
    def pack(
        self,
        selection: Selection,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        lengths: Sequence[int] | None,
        *,
        embedding: Any = None,
        fold: bool | None = None,
    ) -> SharedBatch:
        """The packed batch of rows [B, T] with their prompts.

        Args:
            embedding: the table [V, D] or module that gives the tokens' vectors; None: the model's.
            fold: run text that rows share once; None: as ``shared_text`` says.

        Raises:
            ValueError: a row and its prompt are longer than the model's positions.
        """
        embedding = self.model.get_input_embeddings() if embedding is None else embedding
        fold = self.shared_text == "auto" if fold is None else fold
        batch = pack_rows(selection, embedding, input_ids, attention_mask, lengths, fold=fold)
        self._check_room(batch, selection)
        return batch

    def _check_room(self, batch: SharedBatch, selection: Selection) -> None:
        if self.context_length is not None and batch.layout.rows.keys > self.context_length:
            virtual = [length for _, length in selection.prefixes]
            check_room(virtual, (batch.token_slots >= 0).sum(1).tolist(), self.context_length)

    def run(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor]:
        """The model's output on a packed batch, and its logits [M, V] at the slots `read` [M].

        Raises:
            Unsupported: the model did something that the packed layout does not support.
            ValueError: a segment and its prompt are longer than the model's positions.
        """
        layout = batch.layout
        check_room([0], [max(layout.prompts.keys, layout.rows.keys)], self.context_length)
        layout.attention = self.make_ready()
        replayed = self._replayed(batch, read, options)
        if replayed is not None:
            return replayed
        try:
            return self.run_once(batch, read, options)
        except Exception as error:
            if not (layout.attention.ensure() or self._freed_memory(error)):
                raise
        return self.run_once(batch, read, options)  # another attention was set, or memory was short

    def _replayed(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor] | None:
        """The same, from a CUDA graph; None: this batch runs as usual."""
        return None if self.graphs is None else self.graphs.run(self, batch, read, options)

    def _freed_memory(self, error: Exception) -> bool:
        """Whether a batch that did not fit into memory may now, because the graphs' memory is free."""
        if not isinstance(error, torch.OutOfMemoryError) or self.graphs is None or not self.graphs.forget():
            return False
        torch.cuda.empty_cache()
        return True

    def run_once(
        self,
        batch: PackedInputs,
        read: Tensor,
        options: dict[str, Any],
        numbers_at: Callable[..., tuple[Any, Tensor]] | None = None,
    ) -> tuple[Any, Tensor]:
        """:meth:`run` by the model itself, with the attention that is installed now.

        Args:
            numbers_at: gives other numbers than logits; None: :meth:`logits_at`.
        """
        layout = batch.layout
        layout.calls = 0
        output, logits = (numbers_at or self.logits_at)(
            read,
            inputs_embeds=batch.inputs_embeds,
            position_ids=batch.position_ids + self.first_position,
            attention_mask=layout.marker(batch.inputs_embeds.device),
            **options,
        )
        if len(read) or output.get("hidden_states") is not None:  # a compiler leaves out layers that nothing reads
            self._count_calls(layout)
        return output, logits

    def logits_at(self, places: Tensor, **inputs: Any) -> tuple[Any, Tensor]:
        """The model's output on a batch of one row, and its logits [M, V] at `places` [M], computed only there."""
        slots = inputs["inputs_embeds"].shape[1]
        with returning_mappings(self.model.config), faster_products(self.model, slots):
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
        embedding: Any = None,
    ) -> Tensor:
        """[M, V] at `places` [M] among the tokens [T] of a row that runs by itself after its prompt."""
        joined = self.vectors_alone(prompt, input_ids, update, embedding)
        if gradient and not joined.requires_grad:  # quantized layers compute differently without a gradient
            joined.requires_grad_()
        return self.logits_at(places + len(joined) - len(input_ids), inputs_embeds=joined[None])[1]

    def vectors_alone(
        self, prompt: Tensor | None, input_ids: Tensor, update: tuple[Tensor, Tensor] | None, embedding: Any
    ) -> Tensor:
        """[P + T, D], a row's prompt and the vectors of its tokens."""
        embedding = self.model.get_input_embeddings() if embedding is None else embedding
        input_ids, embedding = looked_up(embedding, input_ids)
        table = embedding_table(embedding)
        vectors = table(input_ids)
        if update is not None:
            vectors = updated_embeddings(table, input_ids, *update).to(table.weight.dtype)
        return vectors if prompt is None else torch.cat([prompt.to(vectors.dtype), vectors])

    def _count_calls(self, layout: PackedLayout) -> None:
        """Checks that every layer called this attention, with its window: a layer that did not would mix rows."""
        if not layout.slots:
            return
        config = self.model.config.get_text_config()
        layers = config.num_hidden_layers
        if layout.calls != layers:
            raise Unsupported(f"{layout.calls} attention calls in {layers} layers")
        types = getattr(config, "layer_types", None)
        windowed = "sliding_attention" in types if types else bool(getattr(config, "sliding_window", None))
        if windowed and not layout.windows:
            raise Unsupported("its sliding window does not reach the attention function")


@contextmanager
def failures_of_the_model() -> Iterator[None]:
    try:
        yield
    except (Unsupported, PackedFailure):
        raise
    except Exception as error:
        raise PackedFailure(str(error)) from error


def _places(wanted: Tensor, count: int | None) -> Tensor:
    """Places where `wanted` is true. With a `count` nothing waits for a GPU; -1 fills missing places."""
    if count is None:
        return wanted.nonzero()[:, 0]
    return torch.nonzero_static(wanted, size=count, fill_value=-1)[:, 0]


def packed_types(types: Tensor, batch: SharedBatch) -> Tensor:
    """[1, K], the token types [B, T] of a batch's texts; 0 for prompts."""
    packed = types.new_zeros(1, batch.layout.slots)
    real = batch.token_slots >= 0
    packed[0, batch.token_slots[real]] = types[real]
    return packed


def slots_of_columns(batch: SharedBatch, prompt_columns: int) -> Tensor:
    """[B, P + T]: the slot of each column of the output, -1: none.

    The column before a row's first token, if there is one, has the slot of the prompt's last vector.
    """
    columns = F.pad(batch.token_slots, (prompt_columns, 0), value=-1)
    if columns.shape[1] > batch.token_slots.shape[1]:
        before = F.pad(batch.previous_slots, (prompt_columns - 1, 1), value=-1)
        columns = torch.where(columns >= 0, columns, before)
    return columns


def read_once(answered: Tensor, columns: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The slots to compute logits of, each that `answered` [M] has not already only once; and the columns' places.

    Returns:
        slots [M + N], `answered` first; the place of each column's slot among them, -1: none.
    """
    place = torch.full((slots,), -1, device=answered.device)
    place[answered] = torch.arange(len(answered), device=answered.device)
    wanted = columns[columns >= 0]
    more = wanted[place[wanted] < 0].unique()
    place[more] = torch.arange(len(answered), len(answered) + len(more), device=answered.device)
    return torch.cat([answered, more]), torch.where(columns >= 0, place[columns.clamp(min=0)], -1)


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """[M, V] -> [B, C, V], the values at `places` [B, C]; zeros where a place is -1."""
    if not len(values):
        return values.new_zeros(*places.shape, values.shape[1])
    return F.embedding(places.clamp(min=0), values).masked_fill_(places[..., None] < 0, 0)
