"""``generate`` after compiled prompts: on a cache that hides them from transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..base.modules import evaluating
from ..hf.architecture import cache_keyword
from ..hf.generation import generate_rows
from ..hf.generation_options import TOKEN_TYPES, checked_options, depends_on_padding, with_settings
from ..packed.runner import PackedRunner
from ..packed.self_check import CHECKED_ROWS, SLACK, tolerance
from .compile import pack_texts

if TYPE_CHECKING:
    from .cache import CompiledCache

REFUSED: dict[str, Callable[[Any], bool]] = {"output_attentions": bool, TOKEN_TYPES: lambda value: value is not None}
"""Options that compiled prompts do not have."""


class Continuation:
    """Continues rows that follow compiled prompts, for one model."""

    def __init__(self, runner: PackedRunner) -> None:
        self.runner = runner
        self.model = runner.model
        self.unsupported: str | None = None
        """Why the model cannot generate on this cache; None: it can, as far as is known."""
        self._checked = not runner.check
        from .decoding import DecodeGraphs

        self.graphs = None if runner.graphs is None else DecodeGraphs()
        """On a GPU, the steps that run as CUDA graphs; None: none do."""

    @torch.no_grad()
    def generate(
        self,
        compiled: Tensor,
        prefixes: Sequence[tuple[int, int]],
        input_ids: Tensor,
        attention_mask: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """The result of transformers' ``generate`` for rows [B, T] of any padding, a token or more each.

        Args:
            compiled: [L, 2, R, H', E]
            prefixes: first slot and length of each row's prompt in it.
            options: options of ``generate``; lengths count ``input_ids`` and new tokens.

        Raises:
            Unsupported: the model does something that the packed layout does not support.
            ValueError: an option that cannot be combined with compiled prompts.
        """
        self.runner.make_ready()
        options = with_settings(checked_options(self.model, options, REFUSED), use_cache=True)
        lengths = (attention_mask != 0).sum(1).tolist()
        keys = lengths if depends_on_padding(self.model, options) else [0] * len(lengths)

        def run(rows: list[int], ids: Tensor, mask: Tensor, own: dict[str, Any]) -> Any:
            chosen = [prefixes[row] for row in rows]
            self._check(compiled, chosen, ids, mask)
            cache = self._cache(compiled, chosen, mask)
            output = self._generate(cache, ids, mask, own)
            if not all(layer.was_read for layer in cache.layers):
                raise Unsupported("its attention does not read what it has cached")
            return output

        from .cache import place_after_prompts
        from .decoding import steps_as_graphs

        hook = self.model.register_forward_pre_hook(place_after_prompts, with_kwargs=True)
        try:
            with evaluating(self.model), nullcontext() if self.graphs is None else steps_as_graphs(self.model):
                return generate_rows(self.model, input_ids, attention_mask, options, keys, run)
        finally:
            hook.remove()

    def _generate(self, cache: CompiledCache, ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Any:
        decoding = None
        if self.graphs is not None:
            decoding = self.graphs.decoding(self.model, ids.shape[1], options, self.runner.check)
        cache.decoding = decoding
        kept = False
        try:
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, **{cache_keyword(self.model): cache}, **options
            )
            kept = not isinstance(output, Tensor)
        finally:
            if decoding is not None:
                decoding.end(cache, kept)
        return output

    def _cache(self, compiled: Tensor, prefixes: Sequence[tuple[int, int]], mask: Tensor) -> CompiledCache:
        """A cache for rows with padding on the left."""
        from .cache import CompiledCache, RowPlaces

        places = torch.tensor(prefixes, dtype=torch.int64).view(-1, 2)
        return CompiledCache(RowPlaces(compiled, places, (mask == 0).sum(1).cpu()), self.runner.first_position)

    def _check(
        self, compiled: Tensor, prefixes: Sequence[tuple[int, int]], input_ids: Tensor, attention_mask: Tensor
    ) -> None:
        """Compares the first batch in two steps on the cache with the same rows in the packed layout.

        Raises:
            Unsupported: the two differ, or the cache does not work for this model.
        """
        if self.unsupported is not None:
            raise Unsupported(self.unsupported)
        if self._checked:
            return
        ids, mask, some = input_ids[:CHECKED_ROWS], attention_mask[:CHECKED_ROWS], prefixes[:CHECKED_ROWS]
        try:
            texts = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
            inputs = pack_texts(self.model, texts, some, compiled)
            last = torch.tensor([len(text) for text in texts], device=ids.device).cumsum(0) - 1
            expected = self.runner.run(inputs, last, {})[1].double()
            cache = self._cache(compiled, some, mask)
            for begin, end in ((0, ids.shape[1] - 1), (ids.shape[1] - 1, ids.shape[1])):
                if begin < end:
                    new = ids[:, begin:end]
                    step = {"input_ids": new, "position_ids": cache.positions(new), "attention_mask": mask[:, :end]}
                    output = self.model(**step, **{cache_keyword(self.model): cache}, use_cache=True)
            got = output.logits[:, -1].double()
            difference = ((got - expected).abs().max() / expected.abs().max()).item()
            allowed = tolerance(self.model, SLACK)
            if not difference <= allowed:
                raise Unsupported(f"cached logits differ by {difference:.1e}, more than the tolerance {allowed:.0e}")
        except Exception as error:
            reason = str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
            self.unsupported = f"it cannot generate on a cache of compiled prompts: {reason}"
            raise Unsupported(self.unsupported) from error
        self._checked = True
