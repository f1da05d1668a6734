"""``compress_documents``: several documents, each a prompt of its own, trained so that they can be joined."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..base.files import check_folder, write_json
from ..base.modules import undisturbed
from ..base.progress import progress_bar
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.card import write_card
from ..tasks.containers import as_rows
from ..tasks.task import Task
from ..tasks.templates import field
from .arrangements import OPENING, Arrangement, Documents, Teachers, read_documents
from .document_queries import DocumentQueries
from .fitting import check_fitting
from .initial_choice import add_prompts
from .joining import Composition
from .preparation import (
    cache_folder,
    check_count,
    check_model,
    check_new_files,
    check_queries,
    is_number,
    new_student,
    task_of,
)
from .queries import write_queries
from .retention import NOTHING, Contestant, Retention, measure_retention
from .settings import FITTED, INITS, DistillationSettings
from .teacher import Target, add_text
from .training import train_prompts

DOCUMENTS_FILE = "documents.json"
"""The report of :func:`compress_documents`, beside the folders of its prompts."""
CUT, TRAINED = "documents cut", "trained"


@dataclass(frozen=True)
class DocumentPrompt:
    """The prompt of one document."""

    folder: Path
    tokens: int
    """Positions of the document itself; in the folder those of an opening come before them."""
    document_tokens: int


@dataclass(frozen=True)
class DocumentCompression:
    """The result of :func:`compress_documents`."""

    prompts: dict[str, DocumentPrompt]
    """By the names of the documents."""
    alone: list[Retention]
    """With a query's document in front: nothing, the document cut to the same length, the trained prompt."""
    together: list[Retention]
    """The same with other documents beside it, against the teacher that reads all of them; none: they do not fit."""
    beside: int
    """Number of other documents beside a query's own in training."""
    measured_beside: int
    """Number of other documents beside a query's own in ``together``."""
    init: str
    learning_rate: float
    loss: float
    """Mean training loss of the last tenth of the steps."""
    training_seconds: float
    teacher_seconds: float
    training_queries: int
    held_out_queries: int
    settings: DistillationSettings

    def to_json(self) -> dict[str, Any]:
        """All numbers; folders as texts."""
        values = asdict(self)
        for prompt in values["prompts"].values():
            prompt["folder"] = str(prompt["folder"])
        values["settings"]["init"] = str(values["settings"]["init"])
        return values


def compress_documents(
    model: Any,
    tokenizer: Any,
    documents: Mapping[str, str],
    output: PathLike[str] | str,
    queries: Sequence[Mapping[str, Any]] | None = None,
    *,
    tokens: int = 64,
    beside: int = 1,
    self_queries: int = 0,
    document_column: str = "document",
    text_column: str = "text",
    template: str | None = None,
    chat: bool = False,
    held_out: float | Sequence[Mapping[str, Any]] = 0.2,
    base_name: str | None = None,
    cache: PathLike[str] | str | None = None,
    settings: DistillationSettings | None = None,
    console: Console | None = None,
    **changes: Any,
) -> DocumentCompression:
    """Compresses each document into a prompt, so that prompts of several documents work one after the other.

    Prompts that were trained apart disturb each other when they are joined (arXiv 2606.04557). Here a query is trained
    on twice: after its document alone, and after its document with `beside` others, drawn with the seed, in any order.
    The teacher reads the same documents in the same order. :func:`join_prompts` makes one prompt of several.

    Args:
        model: a decoder of transformers with a language-modelling head.
        documents: texts by name. The names are those of the prompts.
        output: folder for the prompts, ``documents.json`` and self-made queries.
        queries: rows with the template's columns, and in `document_column` the name of the document they are about.
        tokens: N, of each document.
        beside: number of other documents beside a query's own in training; 0: each is trained alone.
        self_queries: number of queries that the model makes itself from each document.
        text_column, template, chat, held_out, base_name, cache, settings, console: as for :func:`compress`.
        changes: fields of :class:`DistillationSettings` to replace. The divergence must be forward.

    Returns:
        The prompts and what they retain, alone and with one document more.

    Raises:
        ValueError: naming the argument, the rule and the value; before the teacher runs.
        TypeError: the model is no decoder that generates text, cannot run keys and values (``form="kv"``), or has an
            attention to which none can be fitted (``init="fitted"``).
        FileExistsError: a folder of a prompt, or a file that would be written, already exists.
        OSError: a folder cannot be written to.
    """
    console = Console(stderr=True) if console is None else console
    settings = replace(DistillationSettings() if settings is None else settings, **changes)
    base, output = model.base_model if isinstance(model, SoftPromptModel) else model, Path(output)
    queries = as_rows([] if queries is None else queries, "queries")
    _check(documents, queries, self_queries, beside, settings)
    check_model(base)
    with undisturbed(base):
        read = read_documents(tokenizer, documents, field(text_column) if template is None else template, chat=chat)
        check_new_files(output, [*documents, DOCUMENTS_FILE], self_queries)
        check_folder(cache_folder(cache), "`cache`")
        tokens = _checked_tokens(tokens, read, settings)
        task = task_of(base, read.source.template, settings, base_name)
        about = DocumentQueries(base, tokenizer, read, task, document_column, settings)
        student = _student(base, read, settings)
        given = about.known(queries)
        about.check_room(given + ([] if is_number(held_out) else about.known(held_out, "held_out")), beside)
        about.check_split(held_out, len(given), self_queries)
        teachers = Teachers(base, tokenizer, read, settings, cache_folder(cache))
        made = about.made(teachers, self_queries)
        write_queries(made, output)
        train, test = about.split(given, made, held_out)
        about.check_room([*train, *test], beside)
        most = about.most_beside([*train, *test], beside)
        asked = about.alone(train) + (about.beside(train, beside, settings.seed) if beside else [])
        held = [about.alone(test), about.beside(test, most, seed=0) if most else []]
        count = len(asked) + sum(map(len, held))
        console.print(f"the teacher answers {count} queries after the documents, or reads its cache", highlight=False)
        start = time.perf_counter()
        with progress_bar(count, console) as advance:
            targets = [target for some in teachers.targets(asked, advance).values() for target in some]
            measured = [teachers.targets(some, advance) for some in held]
        teacher_seconds = time.perf_counter() - start
        alone = {name: [one for one in targets if one.front == read.front((name,))] for name in read.names}
        init, _ = add_prompts(student, read.pieces, tokens, targets, alone, settings, console)
        run = train_prompts(student, read.names, targets, None, settings, init, console)
        models = {CUT: _plain(base, read, tokens), TRAINED: student}
        last = run.losses[-max(1, len(run.losses) // 10) :]
        result = DocumentCompression(
            prompts={name: DocumentPrompt(output / name, tokens, len(ids)) for name, ids in read.pieces.items()},
            alone=_retention(teachers, read, models, measured[0], settings),
            together=_retention(teachers, read, models, measured[1], settings) if most else [],
            beside=beside,
            measured_beside=most,
            init=init,
            learning_rate=run.learning_rate,
            loss=sum(last) / len(last),
            training_seconds=run.seconds,
            teacher_seconds=teacher_seconds,
            training_queries=len(train),
            held_out_queries=len(test),
            settings=settings,
        )
        _save(result, base, student, read, task)
        write_json(output / DOCUMENTS_FILE, result.to_json())
    print_documents(result, console)
    return result


def _check(
    documents: Mapping[str, str],
    queries: Sequence[Any] | None,
    self_queries: int,
    beside: int,
    settings: DistillationSettings,
) -> None:
    check_queries(queries, self_queries)
    if not isinstance(beside, Integral) or not 0 <= beside < max(2, len(documents)):
        raise ValueError(f"`beside` must be 0 to {len(documents) - 1}, the number of other documents, got {beside}")
    if settings.divergence != "forward":
        raise ValueError(f"`divergence` must be forward for several documents, got {settings.divergence}")
    if settings.free_continuations != DistillationSettings().free_continuations:
        raise ValueError("`free_continuations` cannot be given for several documents, which are not continued freely")
    if settings.init not in ("auto", *INITS):
        raise ValueError(f"`init` must be {', '.join(('auto', *INITS))} for several documents, got {settings.init}")


def _checked_tokens(tokens: int, read: Documents, settings: DistillationSettings) -> int:
    tokens = check_count(tokens, settings)
    name, ids = min(read.pieces.items(), key=lambda item: len(item[1]))
    if tokens >= len(ids):
        raise ValueError(f"`tokens` must be below the {len(ids)} tokens of {name!r}, got {tokens}")
    return tokens


def _student(base: Any, read: Documents, settings: DistillationSettings) -> SoftPromptModel:
    """A model with the opening, which is not trained.

    Raises:
        TypeError: the model cannot run keys and values, or none can be fitted to its attention.
    """
    student = new_student(base, settings)
    if isinstance(student, DeepPromptModel) and settings.init == FITTED:
        check_fitting(student)
    if read.opening:
        add_text(student, OPENING, read.opening)
        student.prompts[OPENING].requires_grad_(False)
    return student


def _plain(base: Any, read: Documents, tokens: int) -> SoftPromptModel:
    """A model with the first tokens of each document."""
    plain = SoftPromptModel(base)
    for name, ids in read.pieces.items():
        add_text(plain, name, ids[:tokens])
    if read.opening:
        add_text(plain, OPENING, read.opening)
    return plain


def _retention(
    teachers: Teachers,
    read: Documents,
    models: Mapping[str, SoftPromptModel],
    targets: Mapping[Arrangement, list[Target]],
    settings: DistillationSettings,
) -> list[Retention]:
    """Of each model over all arrangements: means over places and, of the first tokens, over queries."""
    parts = []
    for arrangement, some in targets.items():
        nothing, front = read.front(()), read.front(arrangement)
        fronts = [(NOTHING, models[CUT], nothing), *((label, model, front) for label, model in models.items())]
        contestants = [
            Contestant(label, sum(len(model.prompts[name]) for name in names), model, names)
            for label, model, names in fronts
        ]
        parts.append(measure_retention(teachers[arrangement], contestants, some, settings))
    places = [sum(len(target.continuation) for target in some) for some in targets.values()]
    queries = [len(some) for some in targets.values()]

    def mean(values: Sequence[float], weights: Sequence[int]) -> float:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    return [
        replace(
            own[0],
            agreement=mean([one.agreement for one in own], places),
            kl=mean([one.kl for one in own], places),
            first_token=mean([one.first_token for one in own], queries),
        )
        for own in zip(*parts, strict=True)
    ]


def _save(result: DocumentCompression, base: Any, student: SoftPromptModel, read: Documents, task: Task) -> None:
    """Each prompt begins with the opening, so that it can be used alone; a composition says how to join them."""
    saved, run = new_student(base, result.settings), uuid.uuid4().hex
    untrained = len(read.opening) + int(result.settings.keep_first)
    for name, prompt in result.prompts.items():
        values = torch.cat([student.prompts[part].detach() for part in read.front((name,))])
        if isinstance(saved, DeepPromptModel):
            saved.add_prompt(name, init=values, num_frozen_tokens=untrained)
        else:
            saved.add_prompt(name, init=values)
        saved.save_pretrained(prompt.folder.parent, [name])
        replace(task, prompt=name).save(prompt.folder)
        Composition(run, (name,), result.beside, len(read.opening)).save(prompt.folder)
        write_card(prompt.folder)


def print_documents(result: DocumentCompression, console: Console) -> None:
    """What the prompts retain, alone and together."""
    others = f"{result.measured_beside} other{'' if result.measured_beside == 1 else 's'} beside it"
    for title, retention in (("its document alone", result.alone), (others, result.together)):
        if not retention:
            console.print("Two documents do not fit into the context together.", highlight=False)
            continue
        table = Table(title=f"Retention on {result.held_out_queries} held-out queries, {title}", title_justify="left")
        table.add_column("in front of a query")
        for heading in ("tokens", "same token", "KL per token", "same first token"):
            table.add_column(heading, justify="right")
        for one in retention:
            numbers = (str(one.tokens), f"{one.agreement:.3f}", f"{one.kl:.3f}", f"{one.first_token:.3f}")
            table.add_row(one.label, *numbers, style="bold" if one.label == TRAINED else None)
        console.print(table)
    if not result.beside:
        console.print("Each prompt was trained alone: joined, they disturb each other.", highlight=False)
