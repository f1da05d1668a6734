"""Runs rows of token ids on the prompts of a view: compiled if that is possible, else together with the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..compiled.compile import pack_texts
from ..compiled.continuation import Continuation
from ..compiled.prefix_runner import PrefixRunner
from ..evaluation.likelihood import Ids, ModelBackend, joined, target_places
from ..hf import architecture
from ..hf.generation_options import with_settings
from ..packed.self_check import CHECKED_ROWS, SLACK, tolerance
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..tasks.collation import padded
from .prompt_bank import PromptBank, View


class Engine:
    """The model of a bank. Every method takes a view, the token ids of rows, and the name of each row's prompt."""

    def __init__(self, bank: PromptBank) -> None:
        self.bank = bank
        self.model = bank.model
        self.base = bank.model.base_model
        self._compared = not bank.check
        assert self.model.runner is not None
        self.continuation = Continuation(self.model.runner)

    @torch.no_grad()
    def target_logits(self, view: View, texts: Ids, names: Sequence[str | None], targets: Ids) -> Tensor:
        """[M, V], row by row for all M target tokens: each after the text and the target tokens before it."""
        if architecture.is_encoder_decoder(self.base):
            return ModelBackend(self.model, list(names), view.prompts).target_logits(texts, targets)
        return self.logits_at(view, joined(texts, targets), names, torch.tensor(target_places(texts, targets)))

    @torch.no_grad()
    def logits_at(self, view: View, texts: Ids, names: Sequence[str | None], places: Tensor) -> Tensor:
        """[M, V], of the tokens after those at `places` [M, 2] (row, index of the token)."""
        if view.compiled is not None and not self._compared:
            self._compare(view, texts, names)
        if view.compiled is not None and self.bank.uncompiled is None:
            try:
                return self._compiled_logits(view, texts, places)
            except Unsupported as error:
                self.bank.stop_compiling(str(error))
        ids, mask = padded(texts, self.model.device)
        return self.model.logits_at(ids, mask, list(names), places.to(ids.device), prompts=self._plain(view))

    def _plain(self, view: View) -> FastSoftPrompt:
        """The prompts, to run with the batch."""
        if view.deep:
            raise ValueError(f"{', '.join(sorted(view.deep))}: deep prompts run only compiled: {self.bank.uncompiled}")
        return view.prompts

    def _compiled_logits(self, view: View, texts: Ids, places: Tensor) -> Tensor:
        assert view.compiled is not None and self.model.runner is not None
        inputs = pack_texts(self.base, texts, view.prefixes, view.compiled)
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
        read = (starts[places[:, 0]] + places[:, 1]).to(inputs.inputs_embeds.device)
        return self.model.runner.run(inputs, read, {})[1]

    def _compare(self, view: View, texts: Ids, names: Sequence[str | None]) -> None:
        """Compares the first batch with the same rows run with their prompts in the batch.

        That run compares itself with each row run alone. If the results differ, prompts are not compiled any more.
        """
        texts, names = texts[:CHECKED_ROWS], names[:CHECKED_ROWS]
        last = torch.tensor([[row, len(text) - 1] for row, text in enumerate(texts)])
        some = View(view.prompts, view.compiled, view.prefixes[:CHECKED_ROWS])
        ids, mask = padded(texts, self.model.device)
        plain = [None if name in view.deep else name for name in names]
        expected = self.model.logits_at(ids, mask, plain, last.to(ids.device), prompts=view.prompts).double()
        for row, name in enumerate(names):
            if name is not None and name in view.deep:
                expected[row] = self._deep_alone(view.prompts[name], ids[row, : len(texts[row])])
        self._compared = True
        try:
            got = self._compiled_logits(some, texts, last).double()
        except Exception as error:  # the rows are good, they have just run
            self.bank.stop_compiling(str(error))
            return
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        allowed = tolerance(self.base, SLACK if view.deep else 1.0)
        if not difference <= allowed:
            self.bank.stop_compiling(f"they differ by {difference:.1e}, more than the tolerance {allowed:.0e}")

    def _deep_alone(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """[V], of the token after the tokens [T] of a row that runs by itself after its deep prompt."""
        place = torch.tensor([len(ids) - 1], device=ids.device)
        return PrefixRunner(self.base, check=False).logits_alone(prompt, ids, place, gradient=False)[0].double()

    @torch.no_grad()
    def generate(self, view: View, texts: Ids, names: Sequence[str | None], options: dict[str, Any]) -> Tensor:
        """[B, N], the new tokens of each row; B is multiplied by ``num_return_sequences`` if several are asked for."""
        options = with_settings(options, return_dict_in_generate=False)  # whatever the model's configuration says
        if architecture.is_encoder_decoder(self.base):
            ids, mask = padded(texts, self.model.device)
            output: Tensor = self.model.generate(ids, mask, list(names), prompts=view.prompts, **options)
            return output
        ids, mask = padded(texts, self.model.device, side="left")
        if view.compiled is not None and not self._compared and all(texts[:CHECKED_ROWS]):
            self._compare(view, texts, names)
        if view.compiled is not None and self.bank.uncompiled is None:
            try:
                continued: Tensor = self.continuation.generate(view.compiled, view.prefixes, ids, mask, options)
                return continued[:, ids.shape[1] :]
            except Unsupported as error:
                self.bank.stop_compiling(str(error))
        output = self.model.generate(ids, mask, list(names), prompts=self._plain(view), **options)
        return output[:, ids.shape[1] :]

    @torch.no_grad()
    def hidden_states(self, view: View, texts: Ids, names: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """[B, T, D], the last hidden state of each token, and the mask [B, T] of tokens."""
        ids, mask = padded(texts, self.model.device)
        if architecture.is_encoder_decoder(self.base):
            batch = view.prompts(ids, mask, embedding=self.model.get_input_embeddings(), prompt_ids=list(names))
            states = self.base.get_encoder()(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)
            return batch.unpack(states.last_hidden_state), mask
        if view.deep and view.compiled is not None and self.model.runner is not None:
            inputs = pack_texts(self.base, texts, view.prefixes, view.compiled)
            output, _ = self.model.runner.run(inputs, inputs.position_ids[0, :1] * 0, {"output_hidden_states": True})
            packed = output.hidden_states[-1][0]
            states = packed.new_zeros(*ids.shape, packed.shape[-1])
            states[mask == 1] = packed
            return states, mask
        output = self.model(ids, mask, None, list(names), prompts=view.prompts, output_hidden_states=True)
        states = getattr(output, "last_hidden_state", None)
        return (output.hidden_states[-1] if states is None else states), mask
