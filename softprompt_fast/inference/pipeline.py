"""``SoftPromptPipeline``: texts in, answers out, a prompt for each text, in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..evaluation.ensembles import COMBINATIONS, combine_members
from ..hf import architecture
from ..hf.generation_options import setting, with_end_token, with_settings
from ..tasks.containers import listed
from ..tasks.cuts import counting_cuts
from ..tasks.label_tree import LabelTree
from .engine import Engine
from .prompt_bank import PromptBank
from .requests import OnResult, Request, Result, Run, Unit, answer
from .scoring import label_scores, label_units, score_head, score_units
from .texts import Encoded, Labels, Prompts, TextEncoder, Texts, prompt_of_each


class SoftPromptPipeline:
    """Answers any mix of prompts in batches of similar lengths.

    A row that cannot be answered (unknown prompt, no text, too long) gets ``{"error": reason}``; the other rows are
    answered as usual. Results have the order of the input; ``on_result`` sees each as soon as there is one.

    Args:
        bank: the prompts and their model, or a model, for which an empty bank is made.
        tokenizer: the model's tokenizer.
        max_batch_tokens: tokens in a batch, prompts not counted.
        max_batch_rows: rows in a batch.
        progress: show a bar.
    """

    def __init__(
        self,
        bank: PromptBank | Any,
        tokenizer: Any,
        *,
        max_batch_tokens: int = 4096,
        max_batch_rows: int = 64,
        progress: bool = False,
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_batch_rows", max_batch_rows)):
            if value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}")
        self.bank = bank if isinstance(bank, PromptBank) else PromptBank(bank)
        self.tokenizer = tokenizer
        self.max_batch_tokens, self.max_batch_rows = max_batch_tokens, max_batch_rows
        self.progress = progress
        self.engine = Engine(self.bank)
        self.encoder = TextEncoder(self.bank, tokenizer)
        self._base = self.bank.model.base_model

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can read, prompt included; None: no limit."""
        return self.encoder.context_length

    def classify(
        self,
        texts: Texts,
        prompts: Prompts = None,
        *,
        labels: Labels = None,
        ensemble: Sequence[str] | None = None,
        combine: str = "mean_probability",
        on_result: OnResult | None = None,
    ) -> list[Result]:
        """The likeliest label of each text.

        Args:
            texts: strings, or mappings with the columns that a prompt's template names, in any container; items are
                taken by position. The rows of a table are mappings.
            prompts: one for all, or one per text; None: no prompt.
            labels: what the model may say for each label, or the words alone. None: as each prompt's task says.
            ensemble: instead of `prompts`: each text is read with all of these, tokenised once.
            combine: how an ensemble decides: "mean_probability", "mean_logit" or "majority" (Lester et al. 2021,
                section 6, use the majority).

        Returns:
            ``{"prediction": label, "scores": {label: probability among the labels}}``; for an ensemble also
            ``"agreement"``, the share of its prompts whose own decision is the ensemble's.
        """
        if combine not in COMBINATIONS:
            raise ValueError(f"`combine` must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
        if ensemble is not None and prompts is not None:
            raise ValueError("`ensemble` cannot be combined with `prompts`")
        if ensemble is not None and not ensemble:
            raise ValueError("`ensemble` must name at least one prompt, got none")
        rows = listed(texts, "texts", "texts")
        if isinstance(labels, str):
            raise TypeError("`labels` must be a list or a mapping of words, got one str")
        labels = labels if labels is None or isinstance(labels, Mapping) else list(labels)
        each = prompt_of_each(prompts, rows)
        members = [[name] for name in each] if ensemble is None else [list(ensemble) for _ in rows]
        head = architecture.classifies_rows(self._base)

        trees: dict[tuple[tuple[int, ...], ...], LabelTree] = {}  # rows of a task share one

        def prepare(index: int) -> Request:
            names = members[index]
            words = self.encoder.label_words(labels, rows[index], names[0]) if not head else {}
            key = tuple(map(tuple, words.values()))
            tree = trees[key] if key in trees else trees.setdefault(key, LabelTree(key))
            encoded: Encoded = {}
            units: list[Unit] = []
            for name in names:
                ids = self.encoder.ids(rows[index], name, encoded)
                if head:
                    units.append(Unit(index, len(units), name, ids))
                else:
                    units += label_units(tree, index, len(units), name, ids)
            names_of_labels = list(self._base.config.id2label.values()) if head else list(words)

            def finish(results: list[list[float]]) -> Result:
                logits = np.asarray(results if head else label_scores(tree, results)).reshape(len(names), -1)
                return combine_members(names_of_labels, logits, combine if ensemble is not None else None)

            return Request(units, finish)

        run = partial(score_head if head else score_units, self.engine)
        return self._answer(len(rows), prepare, run, on_result)

    def score(
        self,
        texts: Texts,
        continuations: Iterable[str],
        prompts: Prompts = None,
        *,
        on_result: OnResult | None = None,
    ) -> list[Result]:
        """How likely the model continues each text with the given one.

        Returns:
            ``{"log_probability": sum, "token_log_probabilities": [..]}``, natural logarithms.
        """
        rows, following = listed(texts, "texts", "texts"), listed(continuations, "continuations", "texts")
        if len(following) != len(rows):
            raise ValueError(f"`continuations` must be one for each of the {len(rows)} texts, got {len(following)}")
        names = prompt_of_each(prompts, rows)

        def prepare(index: int) -> Request:
            target = self.encoder.target(rows[index], names[index], following[index])
            unit = Unit(index, 0, names[index], self.encoder.ids(rows[index], names[index]), target)
            return Request([unit], finish)

        def finish(results: list[list[float]]) -> Result:
            return {"log_probability": sum(results[0]), "token_log_probabilities": results[0]}

        return self._answer(len(rows), prepare, lambda units: score_units(self.engine, units), on_result)

    def generate(
        self,
        texts: Texts,
        prompts: Prompts = None,
        *,
        on_result: OnResult | None = None,
        **generation_options: Any,
    ) -> list[Result]:
        """Continues each text.

        Args:
            generation_options: of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``,
                ``stop_strings``, ``streamer`` (for one text) and so on.

        Returns:
            ``{"text": new text}``; with ``num_return_sequences`` above 1 ``{"texts": [..]}``.
        """
        options = dict(generation_options)
        if not getattr(self._base, "can_generate", lambda: False)():
            raise TypeError(f"{type(self._base).__name__} cannot generate text")
        if setting(self._base, options, "pad_token_id") is None:
            pad = self.tokenizer.pad_token_id
            options = with_settings(options, pad_token_id=self.tokenizer.eos_token_id if pad is None else pad)
        options = with_end_token(self._base, self.tokenizer.eos_token_id, options)
        if setting(self._base, options, "stop_strings"):
            options["tokenizer"] = self.tokenizer
        rows = listed(texts, "texts", "texts")
        names = prompt_of_each(prompts, rows)
        new = 0 if architecture.is_encoder_decoder(self._base) else setting(self._base, options, "max_new_tokens") or 0
        copies = setting(self._base, options, "num_return_sequences") or 1

        def prepare(index: int) -> Request:
            unit = Unit(index, 0, names[index], self.encoder.ids(rows[index], names[index]))
            self.encoder.check_length(len(unit.ids) + new, names[index], f" and {new} new ones" if new else "")
            space = self.encoder.answer_space(names[index])

            def finish(results: list[list[str]]) -> Result:
                answers = [text.removeprefix(space) for text in results[0]]
                return {"text": answers[0]} if copies == 1 else {"texts": answers}

            return Request([unit], finish)

        def run(units: list[Unit]) -> list[Any]:
            chosen = [unit.prompt for unit in units]
            with self.bank.use(chosen) as view:
                tokens = self.engine.generate(view, [unit.ids for unit in units], chosen, options)
            answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            return [answers[i : i + copies] for i in range(0, len(answers), copies)]

        return self._answer(len(rows), prepare, run, on_result)

    def embed(
        self,
        texts: Texts,
        prompts: Prompts = None,
        *,
        pooling: str = "mean",
        on_result: OnResult | None = None,
    ) -> list[Result]:
        """A vector for each text: its tokens' last hidden states, prompts not counted.

        Args:
            pooling: "mean", "first" or "last".

        Returns:
            ``{"embedding": numpy [D] float32}``
        """
        pools = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1]}
        if pooling not in pools:
            raise ValueError(f"`pooling` must be one of {', '.join(pools)}, got {pooling!r}")
        rows = listed(texts, "texts", "texts")
        names = prompt_of_each(prompts, rows)

        def prepare(index: int) -> Request:
            unit = Unit(index, 0, names[index], self.encoder.ids(rows[index], names[index]))
            return Request([unit], lambda results: {"embedding": results[0]})

        def run(units: list[Unit]) -> list[Any]:
            chosen = [unit.prompt for unit in units]
            with self.bank.use(chosen) as view:
                states, mask = self.engine.hidden_states(view, [unit.ids for unit in units], chosen)
            return [pools[pooling](x[m == 1].float()).cpu().numpy() for x, m in zip(states, mask, strict=True)]

        return self._answer(len(rows), prepare, run, on_result)

    def _answer(
        self, count: int, prepare: Callable[[int], Request], run: Run, on_result: OnResult | None
    ) -> list[Result]:
        with counting_cuts():
            return answer(
                count,
                prepare,
                run,
                max_rows=self.max_batch_rows,
                max_tokens=self.max_batch_tokens,
                on_result=on_result,
                progress=self.progress,
            )
