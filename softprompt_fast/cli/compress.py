"""``compress``: turns a long text in front of requests into a few virtual tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
from ..base.files import check_folder
from ..distillation.settings import TEACHER, TRAINING, DistillationSettings
from .data import DataOptions, is_text_file
from .options import DATA, OUTPUT, PROMPT, Device, Dtype, Figure, Model, PromptName, with_options
from .output import check_outputs, console, draw_figure

if TYPE_CHECKING:
    from ..tasks.examples import Examples

ONE_TEXT = ("name", "figure", "report", "max_drop", "free_continuations")
SEVERAL_TEXTS = ("beside", "document_column")
"""Options that only one text, or only several texts, read."""
TextFiles = Annotated[
    list[Path],
    typer.Option(
        "--text",
        "-t",
        help="File of the text: a system prompt, a block of examples, or documents. Several files (--text a.txt "
        "--text b.txt) are documents, each of which becomes a prompt with the file's name.",
    ),
]
DocumentColumn = Annotated[
    str,
    typer.Option(help="Several documents: column with the name of a query's document.", rich_help_panel=DATA),
]
Beside = Annotated[
    int,
    typer.Option(
        min=0,
        help="Several documents: number of others that stand beside a query's own in training, so that prompts can be "
        "joined.",
        rich_help_panel=TRAINING,
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="The text is a system prompt and a query is a user's turn: both are put into the model's chat template.",
        rich_help_panel=DATA,
    ),
]
Queries = Annotated[
    str | None,
    typer.Option(
        "--queries",
        "-q",
        help="Queries without answers: a jsonl, json, csv, tsv, parquet or txt file (a query on each line), a folder "
        "of files, or a Hub dataset.",
        rich_help_panel=DATA,
    ),
]
SelfQueries = Annotated[
    int,
    typer.Option(min=0, help="Number of queries that the model makes itself from the text.", rich_help_panel=DATA),
]
TextColumn = Annotated[str, typer.Option(help="Column of the query.", rich_help_panel=DATA)]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"Query as it follows the text, with columns in braces; \n is a line break. By default the column alone.",
        rich_help_panel=DATA,
    ),
]
HeldOut = Annotated[
    str,
    typer.Option(
        help="Queries that measure retention and are not trained on: a share (below 1) or number of them, or a file.",
        rich_help_panel=DATA,
    ),
]
Tokens = Annotated[
    str,
    typer.Option(
        "--tokens", "-n", help="Numbers of virtual tokens, separated by commas. Each gives a prompt.",
        rich_help_panel=PROMPT,
    ),
]  # fmt: skip
MaxDrop = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="The recommended number of tokens is the smallest whose agreement with the whole text is at most this "
        "much below the best one's.",
        rich_help_panel=PROMPT,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the prompts and the report.")]
Page = Annotated[
    Path | None,
    typer.Option("--report", help="HTML page with tables and figures; it needs no other file.", rich_help_panel=OUTPUT),
]
TeacherCache = Annotated[
    Path | None,
    typer.Option(
        help="Folder in which the teacher's answers are kept. By default the cache directory, which info shows.",
        rich_help_panel=TEACHER,
    ),
]


@with_options("settings_of", DistillationSettings)
@with_options("data_options_of", DataOptions)
def compress(
    context: typer.Context,
    model: Model,
    text: TextFiles,
    data_options_of: Callable[..., DataOptions],
    settings_of: Callable[..., DistillationSettings],
    output: Output = Path("compressed"),
    chat: Chat = False,
    queries: Queries = None,
    self_queries: SelfQueries = 0,
    text_column: TextColumn = "text",
    document_column: DocumentColumn = "document",
    template: Template = None,
    held_out: HeldOut = "0.2",
    tokens: Tokens = "16",
    beside: Beside = 1,
    max_drop: MaxDrop = 0.01,
    name: PromptName = "prompt",
    teacher_cache: TeacherCache = None,
    figure: Figure = None,
    report: Page = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Turns a long text in front of requests into a few virtual tokens that have the same effect, without labels."""
    data_options = data_options_of()
    settings = settings_of()
    files = [name for name in (queries, None if _number(held_out) is not None else held_out) if name is not None]
    data_options.check_used(files)
    _check_drawings({"--figure": figure, "--report": report}, [*text, *map(Path, files)])
    _check_folders({"--output": output, "--teacher-cache": teacher_cache})
    counts = _counts(tokens)
    from ..distillation.documents import compress_documents
    from ..distillation.figure import retention_figure
    from ..distillation.page import write_page
    from ..distillation.preparation import check_queries, prompt_names
    from ..distillation.run import compress as compress_text
    from ..hf.loading import load_base_model
    from ..tasks.templates import unescaped

    names = prompt_names(name, counts, settings)
    check_queries([queries] if queries is not None else [], self_queries)
    texts = _texts(text, data_options.encoding)
    template = None if template is None else unescaped(template)
    _check_options(context, several=len(texts) > 1)
    _check_text_column(context, text_column, template)
    if len(texts) > 1 and len(counts) > 1:
        raise ValueError(f"--tokens must be one number for several --text files, got {tokens}")
    rows: Examples = [] if queries is None else _read(queries, text_column, data_options)
    share = _number(held_out)
    measured = _read(held_out, text_column, data_options) if share is None else share
    base, tokenizer = load_base_model(model, dtype, device, console=console)
    common: dict[str, Any] = {
        "self_queries": self_queries,
        "text_column": text_column,
        "template": template,
        "chat": chat,
        "held_out": measured,
        "base_name": model,
        "cache": teacher_cache,
        "settings": settings,
        "console": console,
    }
    if len(texts) > 1:
        options = common | {"tokens": counts[0], "beside": beside, "document_column": document_column}
        compress_documents(base, tokenizer, texts, output, rows, **options)
        console.print(f"use several: softprompt-fast join {output}/... --output joined", highlight=False, markup=False)
        return
    (words,) = texts.values()
    result = compress_text(
        base, tokenizer, words, output, rows, tokens=list(names), name=name, max_drop=max_drop, **common
    )
    draw_figure(lambda: retention_figure(result), figure)
    if report is not None:
        console.print(f"wrote {write_page(result, report)}", highlight=False, markup=False, soft_wrap=True)
    use = f"use it: softprompt-fast generate --prompt {result.recommended.folder} --data ..."
    console.print(use, highlight=False, markup=False, soft_wrap=True)


def _read(name: str, column: str, options: DataOptions) -> Examples:
    """Queries of a file, a folder or a Hub dataset."""
    from ..distillation.queries import read_text_lines

    return read_text_lines(Path(name), column, options.encoding) if is_text_file(name) else options.read(name)


def _check_folders(folders: dict[str, Path | None]) -> None:
    for option, path in folders.items():
        if path is not None:
            check_folder(path, option)


def _check_text_column(context: typer.Context, column: str, template: str | None) -> None:
    from ..tasks.templates import columns

    if template is not None and _given(context, "text_column") and column not in columns(template):
        raise ValueError(f"--text-column must be a column that --template names, got {column}")


def _check_drawings(outputs: dict[str, Path | None], inputs: list[Path]) -> None:
    for option, path in outputs.items():
        if path is not None:
            require("train", "matplotlib", purpose=option)
    check_outputs([path for path in outputs.values() if path is not None], inputs)


def _check_options(context: typer.Context, *, several: bool) -> None:
    """Refuses options that would be ignored."""
    for option in ONE_TEXT if several else SEVERAL_TEXTS:
        if _given(context, option):
            shown = "--" + option.replace("_", "-")
            raise ValueError(f"{shown} cannot be given for {'several --text files' if several else 'one --text file'}")


def _given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _texts(files: list[Path], encoding: str | None) -> dict[str, str]:
    """The texts by the names of their files."""
    from ..distillation.arrangements import OPENING
    from ..prompts.peft_files import NAME
    from ..tasks.decoding import decode, read_bytes

    texts: dict[str, str] = {}
    for path in files:
        if path.stem in texts:
            raise ValueError(f"--text must name files of different names, got {path.stem} twice")
        if len(files) > 1 and (not NAME.fullmatch(path.stem) or path.stem == OPENING):
            raise ValueError(
                f"--text must name files whose names are 1 to 128 letters, digits, _ or -, not {OPENING}, because they "
                f"name the prompts, got {path.name}"
            )
        texts[path.stem] = decode(read_bytes(path, str(path)), str(path), encoding)
        if not texts[path.stem].strip():
            raise ValueError(f"{path} must hold words, got an empty text")
    return texts


def _number(text: str) -> float | None:
    """A share or a number; None: the text is a file's name."""
    try:
        return float(text)
    except ValueError:
        return None


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--tokens must be whole numbers with commas between them, got {text!r}") from error
