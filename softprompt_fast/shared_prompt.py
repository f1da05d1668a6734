"""Shared-prompt execution: each distinct prompt runs once per step, padding never, logits only where they are read.

In a causal decoder a prompt's hidden states do not depend on the text behind it. So one copy per step is enough, and
its gradient is exact: it flows back through the keys and values that all its rows read. Linear layers see one sequence
of useful tokens; only attention knows the layout (``shared_attention.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from . import architecture
from .embedding import EmbeddingTable, embedding_table
from .functional import assemble, token_update
from .prompt import Chosen, FastSoftPrompt, PromptIds
from .shared_attention import PackedLayout, RowGroup, Unsupported, install, uninstall

logger = logging.getLogger("softprompt_fast")

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Largest difference between the two ways, relative to the largest logit, that rounding explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
GRADIENT_SHARE = 0.2
"""Weight of the prompts' gradients in that difference: a backward pass rounds several times as much."""
SLACK = 2.0
"""Times that tolerance for deep prompts, which are refused where plain ones only run slower: in bfloat16 sound batches
differ by up to 0.11 (SmolLM2-135M), ones with wrong positions or a lost virtual token by 0.23 and more."""
CHECKED_ROWS = 8
"""Rows of the first batches that are compared at most, spread over the batch."""


@dataclass(eq=False)
class PackedInputs:
    """What a model runs on."""

    inputs_embeds: Tensor
    """[1, K, D]"""
    position_ids: Tensor
    """[1, K]"""
    layout: PackedLayout


@dataclass(eq=False)
class SharedBatch(PackedInputs):
    """A packed batch, and where each token of ``input_ids`` stands in it."""

    token_slots: Tensor
    """[B, T]: slot of each real token, -1 at padding. Tokens of shared text have the slot of the shared copy."""
    previous_slots: Tensor
    """[B, T]: slot of what stands before each real token, -1 where nothing does."""
    last_slots: Tensor
    """[B]: slot of the last vector of each row, -1 for an empty one."""


@dataclass
class Report:
    """How a model is executed, and why."""

    execution: str
    """"shared" or "padded"; of deep prompts, which have no padded form, "shared" or "refused"."""
    reason: str
    checked: dict[str, float]
    """Largest relative difference from each row alone, in the first training and the first inference batch."""


class SharedPrompt:
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
            target = torch.where(previous >= 0, labels.flatten(), -100)
            targets = _places(target != -100, num_targets)
        read = torch.cat([token_slots[tokens], previous[targets]]).clamp(min=0)
        items = {k: v for k, v in options.items() if k == "num_items_in_batch"}
        passed = options if loss_function is None else {k: v for k, v in options.items() if k not in items}
        result = self._attempt(batch, read, passed)
        if result is None:
            return None
        output, logits = result
        if labels is not None:
            expected = torch.where(targets >= 0, target[targets], -100)
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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_architecture(model: Any) -> None:
    """What can be told from a model's class and configuration.

    Raises:
        Unsupported: with the reason.
    """
    if architecture.is_encoder_decoder(model) or not architecture.is_causal(model):
        raise Unsupported("only causal decoders can share a prompt's hidden states")
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise Unsupported("its head is not a language model's")
    if not model._can_set_attn_implementation():
        raise Unsupported("its class ignores transformers' attention interface")
    if "position_ids" not in architecture.forward_parameters(model):
        raise Unsupported("its forward takes no position_ids")
    config = model.config.get_text_config()
    if getattr(config, "alibi", False):
        raise Unsupported("it adds ALiBi to attention scores")
    if getattr(config, "output_router_logits", False):
        raise Unsupported("its loss includes a router loss over all positions")
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise Unsupported(f"it has layers of type {', '.join(sorted(other))}")
    if getattr(model, "loss_type", None) not in (None, "ForCausalLM"):
        raise Unsupported(f"its loss is {model.loss_type}")


def pack_rows(
    bank: FastSoftPrompt,
    embedding: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_ids: PromptIds,
    lengths: Sequence[int] | None,
    *,
    fold: bool,
) -> SharedBatch:
    """Packs rows behind their prompts, each distinct prompt once.

    Args:
        bank: the prompts.
        embedding: the model's input embedding module.
        input_ids: [B, T]
        attention_mask: [B, T] or None.
        prompt_ids: of each row.
        lengths: [B] real tokens on the host; None: counted, which waits for a GPU.
        fold: count text that all rows of a prompt share at their start to the prompt.
    """
    rows, tokens = input_ids.shape
    device = input_ids.device
    chosen = bank.choose(prompt_ids, rows)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if lengths is None:
        lengths = [tokens] * rows if attention_mask is None else real.sum(1).tolist()
    folded = [0] * rows
    table = embedding_table(embedding)
    prompt_lengths = [tensor.shape[0] for tensor in chosen.tensors]
    ranks = real.cumsum(1) - 1
    if fold and device.type == "cpu" and rows > 1:
        folded, chosen = _fold_shared_text(chosen, table, input_ids, real, lengths)
    mask = attention_mask
    if any(folded):
        shared_tokens = ranks < torch.tensor(folded)[:, None]
        kept = real if attention_mask is None else attention_mask  # its values are checked by assemble
        mask = kept.masked_fill(shared_tokens, 0)
    packed = assemble(
        input_ids,
        table.weight,
        chosen.joined(bank, device),
        chosen.offsets,
        chosen.ids,
        mask,
        token_factors=chosen.token_factors(),
        layout="packed",
        embedding_scale=table.scale,
        padding_idx=table.padding_idx,
        lengths=[n - f for n, f in zip(lengths, folded, strict=True)],
    )
    info = packed.packed
    assert info is not None
    count = len(info.prompts)
    prompt_starts = list(accumulate(info.lengths[:count], initial=0))
    prefixes = [(prompt_starts[g], info.lengths[g]) if g >= 0 else (0, 0) for g in info.row_prompts]
    layout = PackedLayout(
        prompts=RowGroup.of(0, info.lengths[:count], [(0, 0)] * count, device),
        rows=RowGroup.of(prompt_starts[-1], info.lengths[count:], prefixes, device),
    )

    # Slots of a row's vectors by their place in [prompt][text]: prompt and folded text are shared, the rest its own.
    shared = torch.tensor(
        [
            (start, prompt_lengths[n] if n >= 0 else 0, f)
            for (start, _), n, f in zip(prefixes, chosen.ids, folded, strict=True)
        ],
        dtype=torch.int64,
    ).view(-1, 3)
    start, virtual, common = shared.to(device, non_blocking=True).unbind(1)
    own = layout.rows.query_table[:, 0]

    def slot_of(rank: Tensor) -> Tensor:
        """[B, X] ranks among a row's real tokens, -1 the last virtual token -> slots; -1 where nothing stands."""
        at = torch.where(
            rank < common[:, None], start[:, None] + virtual[:, None] + rank, own[:, None] + rank - common[:, None]
        )
        return torch.where(rank + virtual[:, None] >= 0, at, -1)

    last = torch.tensor([n - 1 for n in lengths], dtype=torch.int64).to(device, non_blocking=True)
    return SharedBatch(
        inputs_embeds=packed.inputs_embeds,
        position_ids=packed.position_ids,
        layout=layout,
        token_slots=torch.where(real, slot_of(ranks), -1),
        previous_slots=torch.where(real, slot_of(ranks - 1), -1),
        last_slots=slot_of(last[:, None])[:, 0],
    )


def _fold_shared_text(
    chosen: Chosen, table: EmbeddingTable, input_ids: Tensor, real: Tensor, lengths: Sequence[int]
) -> tuple[list[int], Chosen]:
    """Per row, how many of its first tokens all rows of its prompt share; and the prompts with those tokens behind.

    Each row keeps a token of its own. Vectors of tokens carry no gradient of the prompt, so the prompt's is as before.
    A token update is part of the folded vectors, and what is left of it begins behind them.
    """
    folded = [0] * len(chosen.ids)
    longer, updates = list(chosen.tensors), list(chosen.updates)
    for n, prompt in enumerate(chosen.tensors):
        members = [row for row, used in enumerate(chosen.ids) if used == n]
        common = min(lengths[row] for row in members) - 1
        if len(members) < 2 or common < 1:
            continue
        first = input_ids[members[0]][real[members[0]]][:common]
        for row in members[1:]:
            differs = (input_ids[row][real[row]][: len(first)] != first).nonzero()
            first = first[: int(differs[0])] if len(differs) else first
        known = (first >= 0) & (first < len(table.weight))
        if len(first) and known.all():  # an unknown id is left to assemble, which names its place
            update = updates[n]
            if update is None:
                text = table(first).detach()
            else:
                a, b = update
                text, updates[n] = _updated(table, first, a, b), (a[len(first) :], b)
            longer[n] = torch.cat([prompt, text.to(prompt.dtype)])
            for row in members:
                folded[row] = len(first)
    return folded, Chosen(longer, chosen.ids, updates)


def _updated(table: EmbeddingTable, input_ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[T] ids of a text from its start -> [T, D] float32 (float64 of float64), with a token update [U, r], [r, D]."""
    update = token_update(a[None], b[None], len(input_ids), table.weight.dtype)[0]
    vectors = torch.nn.functional.embedding(input_ids, table.weight).to(update.dtype) * table.scale
    return vectors + torch.nn.functional.pad(update, (0, 0, 0, len(vectors) - len(update)))


def compare_with_rows_alone(
    shared: SharedPrompt,
    bank: FastSoftPrompt,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_ids: PromptIds,
) -> float:
    """The largest difference between rows run packed and each run alone: of their logits in the middle and at the end,
    relative to the largest logit, and, where a gradient is recorded, of the prompts' gradients (and of those of their
    token updates), relative to theirs."""
    rows = input_ids.shape[0]
    some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long().tolist()
    chosen = bank.choose(prompt_ids, rows)
    names = bank.indices(prompt_ids, rows)
    ids = names[some] if isinstance(names, Tensor) else [names[row] for row in some]
    mask = None if attention_mask is None else attention_mask[some]
    batch = shared.pack(bank, input_ids[some], mask, ids, None)

    parameters = [*chosen.tensors, *(factor for update in chosen.updates if update is not None for factor in update)]
    trained = [tensor for tensor in parameters if tensor.requires_grad] if torch.is_grad_enabled() else []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        trained = []  # a sharded model's backward needs every rank, whose rows may use fewer prompts
    theirs = [torch.zeros_like(tensor) for tensor in trained]
    alone, read = [], []
    for i, row in enumerate(some):
        real = batch.token_slots[i] >= 0
        slots = batch.token_slots[i][real]
        if not len(slots):
            continue
        prompt = update = None
        if chosen.ids[row] >= 0:
            prompt, update = chosen.tensors[chosen.ids[row]], chosen.updates[chosen.ids[row]]
        places = torch.tensor([len(slots) // 2, len(slots) - 1], device=slots.device)
        text = input_ids[row][real]
        logits = shared.logits_alone(prompt, text, places, gradient=bool(trained), update=update).double()
        if logits.requires_grad:  # at once, so that one row's graph is held at a time
            for total, grad in zip(theirs, _gradients(logits, trained), strict=True):
                total += grad
        alone.append(logits.detach())
        read.append(slots[places])
    if not alone:
        return 0.0
    expected = torch.cat(alone)
    got = shared.run(batch, torch.cat(read), {})[1].double()
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if trained and got.requires_grad:
        for mine, other in zip(_gradients(got, trained), theirs, strict=True):
            apart = ((mine - other).norm() / other.norm().clamp(min=1e-30)).item()
            difference = max(difference, GRADIENT_SHARE * apart)
    return difference


def _gradients(logits: Tensor, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Of the sum of squares of the logits; zeros for a prompt that does not reach them."""
    if not prompts:
        return []
    found = torch.autograd.grad(logits.square().sum(), list(prompts), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(prompts, found, strict=True)]


def _places(wanted: Tensor, count: int | None) -> Tensor:
    """Places where `wanted` holds; with their number known nothing waits for a GPU, and -1 fills what is missing."""
    if count is None:
        return wanted.nonzero()[:, 0]
    return torch.nonzero_static(wanted, size=count, fill_value=-1)[:, 0]


def _of_tokens(states: Tensor, token_slots: Tensor) -> Tensor:
    """[K, D] -> [B, T, D], zeros at padding."""
    return torch.where(token_slots[..., None] >= 0, states[token_slots.clamp(min=0)], 0)
