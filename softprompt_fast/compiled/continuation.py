"""``generate`` after compiled prompts. They are read in place, or gathered where reading in place does not work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..hf.generation import generate_with_stand_ins
from ..ops.packing.functional import unpack
from ..ops.segment_attention.functional import available
from ..packed.runner import PackedRunner
from .compile import pack_texts

logger = logging.getLogger("softprompt_fast")


class Continuation:
    """Continues rows that follow compiled prompts, in the fastest way that works for one model."""

    def __init__(self, runner: PackedRunner) -> None:
        self.runner = runner
        self.model = model = runner.model
        config = model.config.get_text_config()
        self.in_place = available(model.get_input_embeddings().weight)
        self._in_place_works = False
        # A window counts places in the cache, so no padding may be between a prompt and its text.
        self._prompts_first = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"} and not getattr(
            config, "sliding_window", None
        )

    @torch.no_grad()
    def generate(
        self,
        compiled: Tensor,
        prefixes: Sequence[tuple[int, int]],
        input_ids: Tensor,
        attention_mask: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """The result of transformers' ``generate`` for rows [B, T] of any padding.

        Args:
            compiled: [L, 2, R, H', E]
            prefixes: first slot and length of each row's prompt in it.
            options: options of ``generate``; lengths count ``input_ids`` and new tokens.

        Raises:
            Unsupported: the model does something that the packed layout does not support.
        """
        self.runner.make_ready()
        mask = (attention_mask != 0).long()
        order = mask.argsort(dim=1, stable=True)  # padding to the left
        ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        if self.in_place:
            try:
                output = self._run_prompts_first(compiled, prefixes, input_ids, ids, mask, options, in_place=True)
                self._in_place_works = True
                return output
            except Exception as error:
                if self._in_place_works and not isinstance(error, Unsupported):
                    raise  # an error of the request
                self.in_place = False
                logger.warning("compiled prompts are gathered for text generation: %s", error)
        if self._prompts_first:
            return self._run_prompts_first(compiled, prefixes, input_ids, ids, mask, options, in_place=False)
        return self._run_padding_first(compiled, prefixes, input_ids, ids, mask, options)

    def _run_prompts_first(
        self,
        compiled: Tensor,
        prefixes: Sequence[tuple[int, int]],
        input_ids: Tensor,
        ids: Tensor,
        mask: Tensor,
        options: dict[str, Any],
        *,
        in_place: bool,
    ) -> Any:
        """``generate`` on a cache of ``[prompt][padding][text]``; `in_place`: the cache holds the texts only."""
        from transformers import DynamicCache

        from .cache import RowPlaces, compiled_cache

        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        lengths = torch.tensor([count for _, count in prefixes])
        width = int(lengths.max())
        cache: Any = DynamicCache()
        if in_place:
            padding = (ids.shape[1] - mask.sum(1)).tolist()
            every = [prefix for prefix in prefixes for _ in range(copies)]
            cache = compiled_cache(RowPlaces(compiled, every, [n for n in padding for _ in range(copies)]))
        elif width:
            for layer, (keys, values) in enumerate(gather_prefixes(compiled, prefixes, width)):
                cache.update(keys, values, layer)
            if copies > 1:
                cache.batch_repeat_interleave(copies)
        prompt_mask = (torch.arange(width) < lengths[:, None]).to(mask)
        first = ids.gather(1, mask.argmax(1, keepdim=True))
        stand_ins = torch.cat([first.expand(-1, width), torch.where(mask == 1, ids, first)], 1)
        inputs = {"attention_mask": torch.cat([prompt_mask, mask], 1), "past_key_values": cache}
        return generate_with_stand_ins(self.model, input_ids, stand_ins, inputs, options)

    def _run_padding_first(
        self,
        compiled: Tensor,
        prefixes: Sequence[tuple[int, int]],
        input_ids: Tensor,
        ids: Tensor,
        mask: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """``generate`` on a cache of ``[padding][prompt][text without its last token]``; the texts run packed first."""
        from transformers import DynamicCache

        texts = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
        inputs = pack_texts(self.model, [text[:-1] for text in texts], prefixes, compiled)
        layers, two, slots, heads, size = compiled.shape
        inputs.layout.capture = own = compiled.new_empty(layers, two, inputs.layout.slots, heads, size)
        if inputs.layout.slots:
            self.runner.run(inputs, inputs.position_ids[0, :1] * 0, {})
        width = max([ids.shape[1], *(count + len(text) for (_, count), text in zip(prefixes, texts, strict=True))])
        places = torch.zeros(len(texts), width - 1, dtype=torch.int64)
        stand_ins = torch.tensor([text[:1] or [0] for text in texts], dtype=torch.int64).repeat(1, width)
        whole_mask = torch.zeros(len(texts), width, dtype=torch.int64)
        at = slots
        for row, ((first, count), text) in enumerate(zip(prefixes, texts, strict=True)):
            known = max(len(text) - 1, 0)
            slots_of_row = [*range(first, first + count), *range(at, at + known)]
            at += known
            places[row, width - 1 - len(slots_of_row) :] = torch.tensor(slots_of_row, dtype=torch.int64)
            stand_ins[row, width - len(text) :] = torch.tensor(text, dtype=torch.int64)
            whole_mask[row, width - count - len(text) :] = 1
        cache: Any = DynamicCache()
        states = torch.cat([compiled, own], 2)
        if width > 1:
            for layer, (keys, values) in enumerate(states[:, :, places.to(states.device)].transpose(3, 4)):
                cache.update(keys, values, layer)
        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        given = {"attention_mask": whole_mask.to(mask), "past_key_values": cache}
        return generate_with_stand_ins(self.model, input_ids, stand_ins.to(ids), given, options)


def gather_prefixes(compiled: Tensor, prefixes: Sequence[tuple[int, int]], width: int) -> list[tuple[Tensor, Tensor]]:
    """Each row's compiled prompt, all layers in one pass.

    Returns:
        Per layer, keys and values [B, H', width, E]; zeros after a prompt shorter than ``width``.
    """
    layers, two, slots, heads, size = compiled.shape
    table = torch.tensor([(0, 0, first, count) for first, count in prefixes], dtype=torch.int64).to(compiled.device)
    (rows,) = unpack((compiled.view(layers * two, slots, heads * size).transpose(0, 1),), table, width)
    rows = rows.view(len(prefixes), width, layers, two, heads, size).permute(2, 3, 0, 4, 1, 5)
    return [(layer[0], layer[1]) for layer in rows]
