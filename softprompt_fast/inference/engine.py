"""Runs rows of token ids on the prompts of a view: compiled where that is possible, with the batch elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..compiled.compile import pack_texts
from ..compiled.continuation import Continuation
from ..hf import architecture
from ..packed.self_check import SLACK, TOLERANCE
from ..prompts.fast_soft_prompt import FastSoftPrompt
from .prompt_bank import PromptBank, View

logger = logging.getLogger("softprompt_fast")

Texts = Sequence[Sequence[int]]


class Engine:
    """The model behind a bank. Every method takes a view, the token ids of rows, and the name of each row's prompt."""

    def __init__(self, bank: PromptBank) -> None:
        self.bank = bank
        self.model = bank.model
        self.base = bank.model.base_model
        self._compared = not bank.check
        assert self.model.runner is not None
        self.continuation = Continuation(self.model.runner)

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
        return self.model.logits_at(ids, mask, list(names), places.to(ids.device), prompts=self._plain(view))

    def _plain(self, view: View) -> FastSoftPrompt:
        """The prompts, to run with the batch."""
        if view.deep:
            raise ValueError(f"{', '.join(sorted(view.deep))}: deep prompts run only compiled: {self.bank.uncompiled}")
        return view.prompts

    def _compiled_logits(self, view: View, texts: Texts, places: Tensor) -> Tensor:
        assert view.compiled is not None and self.model.runner is not None
        inputs = pack_texts(self.base, texts, view.prefixes, view.compiled)
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
        read = (starts[places[:, 0]] + places[:, 1]).to(inputs.inputs_embeds.device)
        return self.model.runner.run(inputs, read, {})[1]

    def _compare(self, view: View, texts: Texts, names: Sequence[str | None]) -> None:
        """The first batch also runs with its prompts in it, which compares itself with rows alone."""
        self._compared = True
        texts, names = texts[:8], names[:8]
        last = torch.tensor([[row, len(text) - 1] for row, text in enumerate(texts)])
        some = View(view.prompts, view.compiled, view.prefixes[:8])
        ids, mask = padded(texts, "right", self.model.device)
        plain = [None if name in view.deep else name for name in names]
        expected = self.model.logits_at(ids, mask, plain, last.to(ids.device), prompts=view.prompts).double()
        for row, name in enumerate(names):
            if name is not None and name in view.deep:
                expected[row] = self._deep_alone(view.prompts[name], ids[row, : len(texts[row])])
        try:
            got = self._compiled_logits(some, texts, last).double()
        except Unsupported as error:
            self.bank.give_up(str(error))
            return
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        tolerance = TOLERANCE[self.base.get_input_embeddings().weight.dtype] * (SLACK if view.deep else 1)
        if not difference <= tolerance:
            self.bank.give_up(f"they differ by {difference:.1e} (rounding explains {tolerance:.0e})")

    def _deep_alone(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """[V] behind the tokens [T] of a row that runs by itself behind its deep prompt."""
        from ..compiled.prefix_runner import PrefixRunner  # it stands above this package

        place = torch.tensor([len(ids) - 1], device=ids.device)
        return PrefixRunner(self.base, check=False).logits_alone(prompt, ids, place, gradient=False)[0].double()

    @torch.no_grad()
    def generate(self, view: View, texts: Texts, names: Sequence[str | None], options: dict[str, Any]) -> Tensor:
        """[B, N], the new tokens of each row; rows of B times ``num_return_sequences`` where several are asked for."""
        if architecture.is_encoder_decoder(self.base):
            ids, mask = padded(texts, "right", self.model.device)
            output: Tensor = self.model.generate(ids, mask, list(names), prompts=view.prompts, **options)
            return output
        ids, mask = padded(texts, "left", self.model.device)
        if view.compiled is not None and self.bank.uncompiled is None:
            try:
                continued: Tensor = self.continuation.generate(view.compiled, view.prefixes, ids, mask, options)
                return continued[:, ids.shape[1] :]
            except Unsupported as error:
                self.bank.give_up(str(error))
        output = self.model.generate(ids, mask, list(names), prompts=self._plain(view), **options)
        return output[:, ids.shape[1] :]

    @torch.no_grad()
    def hidden_states(self, view: View, texts: Texts, names: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """[B, T, D], the last hidden state of each token, and the mask [B, T] of tokens."""
        ids, mask = padded(texts, "right", self.model.device)
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
