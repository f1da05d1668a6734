"""``compress``: a long text becomes a few virtual tokens, or a few keys and values."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from ..base.files import size_of
from ..base.modules import undisturbed
from ..base.progress import progress_bar
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.card import write_card
from ..prompts.run_files import weights_digest
from .arrangements import OPENING
from .continuations import FreeContinuations, Scorer, check_scorer, free_continuations
from .cost import bank_of, first_token_seconds
from .initial_choice import add_prompts
from .initial_values import values_from_text
from .preparation import Prepared, prepare
from .report import print_result
from .result import CompressedPrompt, Compression, recommend
from .retention import CUT, NOTHING, POOLED, WHOLE, Contestant, Retention, measure_retention
from .settings import DistillationSettings
from .teacher import TEXT, Target, add_text
from .training import TrainingRun, train_prompts


@dataclass(frozen=True)
class _Trained:
    """A prompt of the student after its training."""

    name: str
    tokens: int
    init: str
    init_losses: dict[str, float]
    run: TrainingRun


def compress(
    model: Any,
    tokenizer: Any,
    text: str,
    output: PathLike[str] | str,
    queries: Sequence[Mapping[str, Any]] | None = None,
    *,
    tokens: int | Sequence[int] = 16,
    self_queries: int = 0,
    text_column: str = "text",
    template: str | None = None,
    chat: bool = False,
    held_out: float | Sequence[Mapping[str, Any]] = 0.2,
    name: str = "prompt",
    base_name: str | None = None,
    max_drop: float = 0.01,
    cache: PathLike[str] | str | None = None,
    scorer: Scorer | None = None,
    settings: DistillationSettings | None = None,
    console: Console | None = None,
    **changes: Any,
) -> Compression:
    """Trains N virtual tokens to have the effect of a long text in front of a query, without labels.

    The teacher is the same frozen model with the whole text in front. It continues each query; the student, with N
    positions in front, learns the probabilities that the teacher gave (context distillation).

    Args:
        model: a decoder of transformers with a language-modelling head.
        text: a system prompt, a few-shot block or documents. The query follows it with nothing between them.
        output: folder for the prompts, ``retention.json`` and self-made queries.
        queries: rows with the template's columns; they need no answers.
        tokens: N, or several numbers that are trained with the same teacher.
        self_queries: number of queries that the model makes itself from the text.
        text_column: column of the query.
        template: how a query is rendered; None: the column's text.
        chat: the text is a system prompt and the query a user's turn of the tokenizer's chat template.
        held_out: queries that measure retention and are not trained on: a share (below 1) or number of all queries, or
            rows of their own.
        name: of the prompt; with several numbers of tokens, their names are ``name-N``.
        base_name: name of the model in ``task.json``; None: the model's own.
        max_drop: the recommended number of tokens is the smallest whose agreement is at most this much below the best.
        cache: folder in which the teacher's answers are kept; None: in the cache directory of this package.
        scorer: another score of free continuations: a function of the teacher's texts and of as many texts of a
            student that returns a number. It is reported under its name. It is first called before the training, with
            the teacher's own texts as the student's.
        settings: None: the defaults.
        changes: fields of :class:`DistillationSettings` to replace.

    Returns:
        The prompts, what they retain and what they cost.

    Raises:
        ValueError: naming the argument, the rule and the value; before the teacher runs.
        TypeError: the model is no decoder that generates text, or cannot run keys and values (``form="kv"``); or
            ``scorer`` is no function that returns a number.
        FileExistsError: a folder of a prompt, or a file that would be written, already exists.
        OSError: a folder cannot be written to.
    """
    console = Console(stderr=True) if console is None else console
    settings = replace(DistillationSettings() if settings is None else settings, **changes)
    check_scorer(scorer, settings)
    base = model.base_model if isinstance(model, SoftPromptModel) else model
    with undisturbed(base):
        prepared = prepare(
            base,
            tokenizer,
            text,
            Path(output),
            [] if queries is None else queries,
            tokens=tokens,
            self_queries=self_queries,
            text_column=text_column,
            template=template,
            chat=chat,
            held_out=held_out,
            name=name,
            base_name=base_name,
            max_drop=max_drop,
            cache=None if cache is None else Path(cache),
            settings=settings,
            console=console,
        )
        train, held_out_targets, answer_seconds = _teach(prepared)
        teacher_seconds = prepared.query_seconds + answer_seconds
        free = free_continuations(prepared.teacher, held_out_targets, settings, scorer)
        whole = Retention(WHOLE, len(prepared.source), agreement=1.0, kl=0.0, first_token=1.0)
        whole = free.whole(whole)  # before the training, so that an error of the scorer costs no training
        student = prepared.student
        trained = []
        for count, prompt in prepared.names.items():
            trained.append(_train(prepared, prompt, count, train))
            student.save_pretrained(prepared.output, [prompt])
            replace(prepared.task, prompt=prompt).save(prepared.output / prompt)
        retention = [whole, *_measure(prepared, held_out_targets, free)]
        result = _result(prepared, trained, retention, len(train), len(free.queries), teacher_seconds, max_drop)
        result.write(prepared.output)
        for one in result.prompts:
            write_card(one.folder)
        print_result(result, console)
    return result


def _teach(prepared: Prepared) -> tuple[list[Target], list[Target], float]:
    """The teacher's targets of the training and of the held-out queries, and its seconds."""
    start = time.perf_counter()
    count = len(prepared.train) + len(prepared.held_out)
    prepared.console.print(
        f"the teacher answers {count} queries after a text of {len(prepared.source)} tokens, or reads its cache",
        highlight=False,
    )
    with progress_bar(count, prepared.console) as advance:
        train = prepared.teacher.targets(prepared.train, advance)
        held_out = prepared.teacher.targets(prepared.held_out, advance)
    return train, held_out, time.perf_counter() - start


def _train(prepared: Prepared, prompt: str, count: int, targets: list[Target]) -> _Trained:
    settings = prepared.settings
    init, losses = str(settings.init), dict[str, float]()
    if prompt not in prepared.student.prompts:
        texts = {prompt: prepared.source.ids}
        own = {prompt: targets}
        init, losses = add_prompts(prepared.student, texts, count, targets, own, settings, prepared.console)
    run = train_prompts(prepared.student, [prompt], targets, prepared.teacher, settings, init, prepared.console)
    return _Trained(prompt, count, init, losses, run)


def _measure(prepared: Prepared, targets: list[Target], free: FreeContinuations) -> list[Retention]:
    """The retention of each contestant, with what it says freely."""
    console, contestants = prepared.console, _contestants(prepared)
    console.print(f"measuring retention on {len(targets)} held-out queries", highlight=False)
    found = measure_retention(prepared.teacher, contestants, targets, prepared.settings)
    if not free.queries:
        return found
    console.print(f"{len(contestants)} candidates continue {len(free.queries)} queries freely", highlight=False)
    compared = []
    with progress_bar(len(contestants) * len(free.queries), console) as advance:
        for contestant, retention in zip(contestants, found, strict=True):
            compared.append(free.of(contestant, retention))
            advance(len(free.queries))
    return compared


def _contestants(prepared: Prepared) -> list[Contestant]:
    """Nothing, the text cut and pooled to each number of tokens, then the trained prompts."""
    source = prepared.source
    plain = SoftPromptModel(prepared.base)
    opening = None if source.frame == 0 else OPENING
    if opening is not None:
        add_text(plain, opening, source.ids[: source.frame])
    contestants = [Contestant(NOTHING, source.frame, plain, opening)]
    for kind, init in ((CUT, "text"), (POOLED, "pooled")):
        for count in prepared.names:
            plain.add_prompt(f"{init}-{count}", init=values_from_text(plain, source.ids, count, init))
            contestants.append(Contestant(kind, count, plain, f"{init}-{count}"))
    form = "virtual tokens" if prepared.settings.form == "embeddings" else "keys and values"
    for count, prompt in prepared.names.items():
        contestants.append(Contestant(f"{count} {form}", count, prepared.student, prompt))
    return contestants


def _result(
    prepared: Prepared,
    trained: list[_Trained],
    retention: list[Retention],
    training_queries: int,
    free_queries: int,
    teacher_seconds: float,
    max_drop: float,
) -> Compression:
    text = prepared.teacher.model.prompts[TEXT].detach()
    banks = [bank_of(prepared.base, text, compiled=False), bank_of(prepared.base, text)]
    banks += [bank_of(prepared.base, prepared.output / one.name) for one in trained]
    whole, kept, *seconds = first_token_seconds(banks, prepared.held_out)
    bytes_per_token = banks[1].bytes_per_token
    prompts = []
    for one, measured, first in zip(trained, retention[-len(trained) :], seconds, strict=True):
        last = one.run.losses[-max(1, len(one.run.losses) // 10) :]
        saved, spent = whole - first, teacher_seconds + one.run.seconds
        prompts.append(
            CompressedPrompt(
                folder=prepared.output / one.name,
                tokens=one.tokens,
                init=one.init,
                init_losses=one.init_losses,
                learning_rate=one.run.learning_rate,
                retention=measured,
                loss=sum(last) / len(last),
                training_seconds=one.run.seconds,
                file_bytes=size_of(prepared.output / one.name),
                cache_bytes=one.tokens * bytes_per_token,
                first_token_seconds=first,
                break_even_requests=math.ceil(spent / saved) if saved > 0 else None,
                weights_sha256=weights_digest(prepared.output / one.name),
            )
        )
    return Compression(
        prompts=prompts,
        recommended=recommend(prompts, max_drop),
        references=retention[: -len(trained)],
        text_tokens=len(prepared.source),
        text_cache_bytes=len(prepared.source) * bytes_per_token,
        text_first_token_seconds=whole,
        compiled_first_token_seconds=kept,
        training_queries=training_queries,
        held_out_queries=len(prepared.held_out),
        free_queries=free_queries,
        teacher_seconds=teacher_seconds,
        max_drop=max_drop,
        settings=prepared.settings,
    )
