"""Runs rows of token ids on the prompts of a view: compiled where that is possible, with the batch elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import architecture
from ..generation import generate_behind
from ..packing import unpack
from ..segment_attention import available
from ..shared_attention import Unsupported
from ..shared_prompt import TOLERANCE
from .bank import PromptBank, View
from .compile import pack_texts

logger = logging.getLogger("softprompt_fast")

Texts = Sequence[Sequence[int]]


class Engine:
    """The model behind a bank. Every method takes a view, the token ids of rows, and the name of each row's prompt."""

    def __init__(self, bank: PromptBank) -> None:
        self.bank = bank
        self.model = bank.model
        self.base = bank.model.base_model
        self._compared = not bank.check
        config = self.base.config.get_text_config()
        self._in_place = available(self.base.get_input_embeddings().weight)
        self._in_place_works = False
        # A cache with a window drops keys by their place, which prompts and padding would shift.
        self._plain_cache = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"} and not getattr(
            config, "sliding_window", None
        )

    @torch.no_grad()
    def logits_behind(self, view: View, texts: Texts, names: Sequence[str | None], places: Tensor) -> Tensor:
        """[M, V] behind the tokens at `places` [M, 2] (row, index of the token)."""
        if view.compiled is not None and not self._compared:
            self._compare(view, texts, names)
        if view.compiled is not None and self.bank.uncompiled is None:
            try:
                return self._compiled_logits(view, texts, places)
            except Unsupported as error:
                self.bank.give_up(str(error))
        ids, mask = padded(texts, "right", self.model.device)
        return self.model.logits_at(ids, mask, list(names), places.to(ids.device), prompts=view.prompts)

    def _compiled_logits(self, view: View, texts: Texts, places: Tensor) -> Tensor:
        assert view.compiled is not None and self.model.shared is not None
        inputs = pack_texts(self.base, texts, view.prefixes, view.compiled)
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
        read = (starts[places[:, 0]] + places[:, 1]).to(inputs.inputs_embeds.device)
        return self.model.shared.run(inputs, read, {})[1]

    def _compare(self, view: View, texts: Texts, names: Sequence[str | None]) -> None:
        """The first batch also runs with its prompts in it, which compares itself with rows alone."""
        self._compared = True
        last = torch.tensor([[row, len(text) - 1] for row, text in enumerate(texts)][:8])
        texts, names = texts[:8], names[:8]
        some = View(view.prompts, view.compiled, view.prefixes[:8])
        ids, mask = padded(texts, "right", self.model.device)
        expected = self.model.logits_at(ids, mask, list(names), last.to(ids.device), prompts=view.prompts).double()
        try:
            got = self._compiled_logits(some, texts, last).double()
        except Unsupported as error:
            self.bank.give_up(str(error))
            return
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        tolerance = TOLERANCE[self.base.get_input_embeddings().weight.dtype]
        if not difference <= tolerance:
            self.bank.give_up(f"they differ by {difference:.1e} (rounding explains {tolerance:.0e})")

    @torch.no_grad()
    def generate(self, view: View, texts: Texts, names: Sequence[str | None], options: dict[str, Any]) -> Tensor:
        """[B, N], the new tokens of each row; rows of B times ``num_return_sequences`` where several are asked for."""
        if architecture.is_encoder_decoder(self.base):
            ids, mask = padded(texts, "right", self.model.device)
            output: Tensor = self.model.generate(ids, mask, list(names), prompts=view.prompts, **options)
            return output
        ids, mask = padded(texts, "left", self.model.device)
        if view.compiled is not None and self.bank.uncompiled is None:
            if self._in_place:
                try:
                    output = self._generate_compiled(view, ids, mask, options, in_place=True)
                    self._in_place_works = True
                    return output
                except Exception as error:
                    if self._in_place_works and not isinstance(error, Unsupported):
                        raise  # the request's own fault
                    self._in_place = False
                    logger.warning("compiled prompts are gathered for text generation: %s", error)
            if self._plain_cache:
                return self._generate_compiled(view, ids, mask, options, in_place=False)
        output = self.model.generate(ids, mask, list(names), prompts=view.prompts, **options)
        return output[:, ids.shape[1] :]

    def _generate_compiled(
        self, view: View, ids: Tensor, mask: Tensor, options: dict[str, Any], *, in_place: bool
    ) -> Tensor:
        from transformers import DynamicCache

        from .cache import Rows, compiled_cache

        assert view.compiled is not None
        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        lengths = torch.tensor([count for _, count in view.prefixes])
        width = int(lengths.max())
        cache: Any = DynamicCache()
        if in_place:
            padding = (ids.shape[1] - mask.sum(1)).tolist()
            prefixes = [prefix for prefix in view.prefixes for _ in range(copies)]
            cache = compiled_cache(Rows(view.compiled, prefixes, [n for n in padding for _ in range(copies)]))
        elif width:
            for layer, (keys, values) in enumerate(gather_prefixes(view.compiled, view.prefixes, width)):
                cache.update(keys, values, layer)
            if copies > 1:
                cache.batch_repeat_interleave(copies)
        prompt_mask = (torch.arange(width) < lengths[:, None]).to(mask)
        first = ids.gather(1, mask.argmax(1, keepdim=True))
        stand_ins = torch.cat([first.expand(-1, width), torch.where(mask == 1, ids, first)], 1)
        inputs = {"attention_mask": torch.cat([prompt_mask, mask], 1), "past_key_values": cache}
        output: Tensor = generate_behind(self.base, ids, stand_ins, inputs, options)
        return output[:, ids.shape[1] :]

    @torch.no_grad()
    def hidden_states(self, view: View, texts: Texts, names: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """[B, T, D], the last hidden state of each token, and the mask [B, T] of tokens."""
        ids, mask = padded(texts, "right", self.model.device)
        if architecture.is_encoder_decoder(self.base):
            batch = view.prompts(ids, mask, embedding=self.model.get_input_embeddings(), prompt_ids=list(names))
            states = self.base.get_encoder()(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)
            return batch.unpack(states.last_hidden_state), mask
        output = self.model(ids, mask, None, list(names), prompts=view.prompts, output_hidden_states=True)
        states = getattr(output, "last_hidden_state", None)
        return (output.hidden_states[-1] if states is None else states), mask

    @torch.no_grad()
    def target_log_probabilities(
        self, view: View, texts: Texts, names: Sequence[str | None], targets: Texts
    ) -> list[list[float]]:
        """Encoder-decoders: the log-probability of each target token behind each text."""
        ids, mask = padded(texts, "right", self.model.device)
        labels, _ = padded(targets, "right", self.model.device)
        logits = self.model(ids, mask, labels, list(names), prompts=view.prompts).logits.float()
        chosen = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0].tolist()
        return [row[: len(target)] for row, target in zip(chosen, targets, strict=True)]


def gather_prefixes(compiled: Tensor, prefixes: Sequence[tuple[int, int]], width: int) -> list[tuple[Tensor, Tensor]]:
    """Each row's compiled prompt, all layers in one pass.

    Returns:
        Per layer, keys and values [B, H', width, E]; zeros behind a prompt shorter than ``width``.
    """
    layers, two, slots, heads, size = compiled.shape
    table = torch.tensor([(0, 0, first, count) for first, count in prefixes], dtype=torch.int64).to(compiled.device)
    (rows,) = unpack((compiled.view(layers * two, slots, heads * size).transpose(0, 1),), table, width)
    rows = rows.view(len(prefixes), width, layers, two, heads, size).permute(2, 3, 0, 4, 1, 5)
    return [(layer[0], layer[1]) for layer in rows]


def padded(texts: Texts, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]; padding holds id 0, which nothing reads."""
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        at = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, at] = torch.tensor(text, dtype=torch.int64)
        mask[row, at] = 1
    return ids.to(device), mask.to(device)
