"""``SoftPromptPipeline``: texts in, answers out, a prompt for each text, in the order of the input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..evaluation.combine import COMBINATIONS, combine_members
from ..hf import architecture
from ..tasks.encoding import encode_text
from ..tasks.task import Task
from .engine import Engine
from .prompt_bank import PromptBank

logger = logging.getLogger("softprompt_fast")

Text = str | Mapping[str, Any]
Prompts = str | None | Sequence[str | None]
Labels = Mapping[str, str] | Sequence[str] | None
Result = dict[str, Any]
OnResult = Callable[[int, Result], None]
Encoded = dict[tuple[str, int, bool] | None, list[int]]
"""A text's token ids, by the template and the length limit of a task; None: as it is."""


@dataclass(eq=False)
class Unit:
    """One run of the model on one text with one prompt."""

    row: int
    member: int
    """Which of the row's units it is."""
    prompt: str | None
    ids: list[int]
    target: list[int] = field(default_factory=list)
    """Tokens whose log-probability is asked for: one behind the other, starting behind `ids`."""
    choices: list[int] | None = None
    """Or: tokens that may follow `ids`."""

    @property
    def input(self) -> list[int]:
        """What a decoder reads: the last target token need not be read to be predicted."""
        return self.ids + self.target[:-1]


@dataclass(eq=False)
class Row:
    """A text and what is to be done with it."""

    units: list[Unit]
    finish: Callable[[list[Any]], Result]
    """The results of all units -> the row's result."""
    found: dict[int, Any] = field(default_factory=dict)


class SoftPromptPipeline:
    """Answers any mix of prompts in batches of alike lengths.

    A row that cannot be answered (unknown prompt, no text, too long) gets ``{"error": reason}``; the others are not
    touched by it. Results come in the order of the input; ``on_result`` sees each as soon as it is there.

    Args:
        bank: the prompts and their model, or a model, for which an empty bank is made.
        tokenizer: of the model.
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
        self._base = self.bank.model.base_model
        self._encoder_decoder = architecture.is_encoder_decoder(self._base)
        config = self._base.config.get_text_config()
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)

    # --- what it does ---

    def classify(
        self,
        texts: Sequence[Text],
        prompts: Prompts = None,
        *,
        labels: Labels = None,
        ensemble: Sequence[str] | None = None,
        combine: str = "mean_probability",
        on_result: OnResult | None = None,
    ) -> list[Result]:
        """The likeliest label of each text.

        Args:
            texts: strings, or mappings with the columns that a prompt's template names.
            prompts: one for all, or one per text; None: no prompt.
            labels: what the model may say for each label, or the words alone. None: as each prompt's task says.
            ensemble: instead of `prompts`: each text is read with all of these, tokenised once.
            combine: how an ensemble decides: "mean_probability", "mean_logit" or "majority" (Lester et al. 2021,
                section 6, use the majority).

        Returns:
            ``{"prediction": label, "scores": {label: probability among the labels}}``; of an ensemble also
            ``"agreement"``, the share of its prompts that decide alone as it does.
        """
        if combine not in COMBINATIONS:
            raise ValueError(f"`combine` must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
        if ensemble is not None and (prompts is not None or not ensemble):
            raise ValueError("`ensemble` must name prompts, and then `prompts` must be left out")
        members = [list(ensemble)] * len(texts) if ensemble is not None else [[p] for p in self._each(prompts, texts)]
        head = architecture.pools_last_token(self._base)

        def prepare(index: int) -> Row:
            names = members[index]
            words = self._words(labels, names[0]) if not head else {}
            units: list[Unit] = []
            encoded: Encoded = {}
            for name in names:
                ids = self._ids(texts[index], name, encoded)
                if head:
                    units.append(Unit(index, len(units), name, ids))
                elif all(len(word) == 1 for word in words.values()) and not self._encoder_decoder:
                    units.append(Unit(index, len(units), name, ids, choices=[word[0] for word in words.values()]))
                else:
                    units += [
                        Unit(index, len(units) + i, name, ids, target=word) for i, word in enumerate(words.values())
                    ]
            names_of_labels = list(self._base.config.id2label.values()) if head else list(words)

            def finish(found: list[Any]) -> Result:
                logits = np.asarray([value for unit in found for value in unit]).reshape(len(names), -1)
                return combine_members(names_of_labels, logits, combine if ensemble is not None else None)

            return Row(units, finish)

        run = self._run_head if head else self._run_scores
        return self._answer(len(texts), prepare, run, on_result)

    def score(
        self,
        texts: Sequence[Text],
        continuations: Sequence[str],
        prompts: Prompts = None,
        *,
        on_result: OnResult | None = None,
    ) -> list[Result]:
        """How likely the model continues each text with the given one.

        Returns:
            ``{"log_probability": sum, "token_log_probabilities": [..]}``, natural logarithms.
        """
        if len(continuations) != len(texts):
            raise ValueError(
                f"`continuations` must be one for each of the {len(texts)} texts, got {len(continuations)}"
            )
        names = self._each(prompts, texts)

        def prepare(index: int) -> Row:
            target = list(self.tokenizer(continuations[index], add_special_tokens=False).input_ids)
            if not target:
                raise ValueError("the continuation has no tokens")
            unit = Unit(index, 0, names[index], self._ids(texts[index], names[index]), target=target)

            def finish(found: list[Any]) -> Result:
                return {"log_probability": found[0][0], "token_log_probabilities": unit_tokens[index]}

            return Row([unit], finish)

        unit_tokens: dict[int, list[float]] = {}
        return self._answer(len(texts), prepare, lambda units: self._run_scores(units, unit_tokens), on_result)

    def generate(
        self,
        texts: Sequence[Text],
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
        if options.get("pad_token_id") is None and getattr(self._base.generation_config, "pad_token_id", None) is None:
            pad = self.tokenizer.pad_token_id
            options["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
        if options.get("stop_strings"):
            options["tokenizer"] = self.tokenizer
        names = self._each(prompts, texts)
        new = 0 if self._encoder_decoder else options.get("max_new_tokens") or 0
        copies = options.get("num_return_sequences") or 1

        def prepare(index: int) -> Row:
            unit = Unit(index, 0, names[index], self._ids(texts[index], names[index]))
            self._check_length(len(unit.ids) + new, names[index], f" and {new} new ones" if new else "")
            return Row([unit], lambda found: {"text": found[0][0]} if copies == 1 else {"texts": found[0]})

        def run(units: list[Unit]) -> list[Any]:
            chosen = [unit.prompt for unit in units]
            with self.bank.use(chosen) as view:
                tokens = self.engine.generate(view, [unit.ids for unit in units], chosen, options)
            said = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            return [said[i : i + copies] for i in range(0, len(said), copies)]

        return self._answer(len(texts), prepare, run, on_result)

    def embed(
        self,
        texts: Sequence[Text],
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
        names = self._each(prompts, texts)

        def prepare(index: int) -> Row:
            unit = Unit(index, 0, names[index], self._ids(texts[index], names[index]))
            return Row([unit], lambda found: {"embedding": found[0]})

        def run(units: list[Unit]) -> list[Any]:
            chosen = [unit.prompt for unit in units]
            with self.bank.use(chosen) as view:
                states, mask = self.engine.hidden_states(view, [unit.ids for unit in units], chosen)
            return [pools[pooling](x[m == 1].float()).cpu().numpy() for x, m in zip(states, mask, strict=True)]

        return self._answer(len(texts), prepare, run, on_result)

    # --- how ---

    def _answer(
        self,
        count: int,
        prepare: Callable[[int], Row],
        run: Callable[[list[Unit]], list[Any]],
        on_result: OnResult | None,
    ) -> list[Result]:
        results: list[Result] = [{} for _ in range(count)]

        def done(index: int, result: Result) -> None:
            results[index] = result
            if on_result is not None:
                on_result(index, result)
            if bar is not None:
                bar.advance(task)

        bar, task = self._bar(count)
        try:
            rows: dict[int, Row] = {}
            for index in range(count):
                try:
                    rows[index] = prepare(index)
                except (KeyError, ValueError) as error:
                    done(index, _failure(error))
            for batch in self._batches([unit for row in rows.values() for unit in row.units]):
                for unit, found in zip(batch, self._attempt(batch, run), strict=True):
                    row = rows.get(unit.row)
                    if row is None:
                        continue
                    row.found[unit.member] = found
                    if isinstance(found, Exception):
                        done(unit.row, _failure(found))
                        del rows[unit.row]
                    elif len(row.found) == len(row.units):
                        done(unit.row, row.finish([row.found[member] for member in sorted(row.found)]))
                        del rows[unit.row]
        finally:
            if bar is not None:
                bar.stop()
        return results

    def _attempt(self, batch: list[Unit], run: Callable[[list[Unit]], list[Any]]) -> list[Any]:
        """A batch's results; if it fails, its rows are tried one by one, and an error takes a failing one's place."""
        try:
            return run(batch)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            logger.warning("a batch of %d rows failed (%s); its rows are tried alone", len(batch), error)
            return [result for unit in batch for result in self._attempt([unit], run)]

    def _batches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """Units of alike lengths together, longest first: what does not fit into memory shows at once."""
        batch: list[Unit] = []
        for unit in sorted(units, key=lambda unit: -len(unit.input)):
            widest = len(batch[0].input) if batch else 0
            if batch and (len(batch) == self.max_batch_rows or widest * (len(batch) + 1) > self.max_batch_tokens):
                yield batch
                batch = []
            batch.append(unit)
        if batch:
            yield batch

    def _run_scores(self, units: list[Unit], tokens: dict[int, list[float]] | None = None) -> list[Any]:
        """Per unit: logits of its choices, or the log-probability of its target alone in a list."""
        names = [unit.prompt for unit in units]
        with self.bank.use(names) as view:
            if self._encoder_decoder:
                targets = [unit.target for unit in units]
                found = self.engine.target_log_probabilities(view, [unit.ids for unit in units], names, targets)
            else:
                places = [
                    (row, len(unit.ids) - 1 + i)
                    for row, unit in enumerate(units)
                    for i in range(max(1, len(unit.target)))
                ]
                logits = self.engine.logits_behind(view, [unit.input for unit in units], names, torch.tensor(places))
                found = self._read(units, logits.float())
        if tokens is not None:
            tokens.update({unit.row: values for unit, values in zip(units, found, strict=True)})
        return [values if unit.choices else [sum(values)] for unit, values in zip(units, found, strict=True)]

    @staticmethod
    def _read(units: list[Unit], logits: torch.Tensor) -> list[list[float]]:
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite")
        sums = logits.logsumexp(-1)
        found, at = [], 0
        for unit in units:
            if unit.choices is not None:
                found.append((logits[at, unit.choices] - sums[at]).tolist())
                at += 1
            else:
                here = torch.arange(at, at + len(unit.target), device=logits.device)
                found.append((logits[here, torch.tensor(unit.target, device=logits.device)] - sums[here]).tolist())
                at += len(unit.target)
        return found

    @torch.no_grad()
    def _run_head(self, units: list[Unit]) -> list[Any]:
        """Logits of a sequence-classification head."""
        from .engine import padded

        names = [unit.prompt for unit in units]
        with self.bank.use(names) as view:
            ids, mask = padded([unit.ids for unit in units], "left", self.bank.model.device)
            logits = self.bank.model(ids, mask, None, names, prompts=view.prompts).logits
        found: list[Any] = logits.float().log_softmax(-1).tolist()
        return found

    def _each(self, prompts: Prompts, texts: Sequence[Text]) -> list[str | None]:
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of texts, got one string")
        if prompts is None or isinstance(prompts, str):
            return [prompts] * len(texts)
        if len(prompts) != len(texts):
            raise ValueError(f"`prompts` must name one for each of the {len(texts)} texts, got {len(prompts)}")
        return list(prompts)

    def _task(self, name: str | None) -> Task | None:
        return None if name is None else self.bank.task(name)

    def _ids(self, text: Text, name: str | None, encoded: Encoded | None = None) -> list[int]:
        """Token ids of a text, rendered with the template of its prompt's task, if there is one.

        Args:
            encoded: what is known of this text already; added to.
        """
        task = self._task(name)
        key = None if task is None else (task.template, task.max_length, task.special_tokens)
        encoded = {} if encoded is None else encoded
        if key not in encoded:
            encoded[key] = self._encode(text, task, name)
        self._check_length(len(encoded[key]), name)
        return encoded[key]

    def _encode(self, text: Text, task: Task | None, name: str | None) -> list[int]:
        if isinstance(text, str) and not text.strip():
            raise ValueError("the text is empty")
        if task is not None and (not isinstance(text, str) or len(task.columns) == 1):
            row = {task.columns[0]: text} if isinstance(text, str) else text
            ids = encode_text(task, row, self.tokenizer, encoder_decoder=self._encoder_decoder)
        elif isinstance(text, str):
            ids = list(self.tokenizer(text).input_ids)
            if architecture.is_causal(self._base) and ids and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # the answer follows here
        else:
            raise ValueError(f"a text must be a string, for prompt {name!r} has no task with a template")
        if not ids:
            raise ValueError("the text has no tokens")
        return ids

    def _check_length(self, tokens: int, name: str | None, more: str = "") -> None:
        virtual = 0 if name is None else len(self.bank[name])
        if self.context_length is not None and tokens + virtual > self.context_length:
            raise ValueError(
                f"a text must fit into the model's context of {self.context_length} tokens, got {tokens} tokens"
                f"{more} behind a prompt of {virtual}"
            )

    def _words(self, labels: Labels, name: str | None) -> dict[str, list[int]]:
        """Token ids of what the model says for each label."""
        if labels is None:
            task = self._task(name)
            if task is None or task.kind != "classification":
                raise ValueError(f"`labels` must be given, for prompt {name!r} has no classification task")
            labels = task.label_words
        words = dict(labels) if isinstance(labels, Mapping) else {word.strip(): word for word in labels}
        found = {label: list(self.tokenizer(word, add_special_tokens=False).input_ids) for label, word in words.items()}
        if len(found) < 2 or not all(found.values()):
            raise ValueError(f"`labels` must be at least two words with tokens, got {words}")
        return found

    def _bar(self, count: int) -> tuple[Any, Any]:
        if not self.progress:
            return None, None
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True))
        bar.start()
        return bar, bar.add_task("rows", total=count)


def _failure(error: Exception) -> Result:
    """The message of an error; a KeyError's own text is in quotes."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return {"error": message or type(error).__name__}
