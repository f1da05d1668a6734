"""The Typer app: its commands in groups, and one line for every error."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

from ..base.version import __version__
from .analyze import analyze
from .build import build
from .clean import clean
from .compare import compare
from .compress import compress
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .interpret import interpret
from .join import join
from .monitor import monitor
from .output import EXIT_STATUS, console
from .predict import predict
from .prune import prune
from .push import push
from .search import search
from .similar import similar
from .train import train
from .versions import EXAMPLES, versions_app

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GROUPS: dict[str, dict[Any, tuple[str, ...]]] = {
    "Start": {demo: (), info: ()},
    "Tune": {
        analyze: (
            f"softprompt-fast analyze -m {MODEL} -d reviews.jsonl",
            f"softprompt-fast analyze -m {MODEL} -d reviews.jsonl --validation test.jsonl --figure data.svg",
        ),
        train: (
            f"softprompt-fast train -m {MODEL} -d reviews.jsonl -o run",
            f"softprompt-fast train -m {MODEL} -d questions.jsonl --task generation --input-column question "
            "--output-column answer",
        ),
        search: (
            f"softprompt-fast search -m {MODEL} -d reviews.jsonl --lengths 1,5,20",
            f"softprompt-fast search -m {MODEL} -d reviews.jsonl --learning-rates 1e-3:1e-1:2 --budget 3",
        ),
        compare: (
            f"softprompt-fast compare -m {MODEL} -d reviews.jsonl --seeds 0,1,2",
            f"softprompt-fast compare -m {MODEL} -d reviews.jsonl --methods prompt,lora --set lora.r=4",
        ),
        compress: (
            f"softprompt-fast compress -m {MODEL} --text system.txt --chat --queries queries.jsonl --tokens 4,16,64",
            f"softprompt-fast compress -m {MODEL} --text a.txt --text b.txt --self-queries 200 --tokens 64 --form kv",
        ),
        join: ("softprompt-fast join compressed/a compressed/b -o joined",),
    },
    "Use": {
        evaluate: (
            "softprompt-fast evaluate -p run -d test.jsonl",
            "softprompt-fast evaluate -p run -d test.jsonl --ensemble",
        ),
        predict: (
            "softprompt-fast predict -p run -d new.csv -o answers.jsonl",
            "softprompt-fast predict -p prompts -d new.parquet -o answers.parquet --prompt-name-column task",
        ),
        generate: (
            "softprompt-fast generate -p run -d new.jsonl --max-new-tokens 100",
            "softprompt-fast generate -p run -d new.jsonl --do-sample --temperature 0.7 --stop END",
        ),
    },
    "Production": {
        versions_app(): EXAMPLES,
        push: (
            "softprompt-fast push run/prompt user/reviews --private",
            "softprompt-fast push sentiment@production user/reviews --revision v2",
        ),
        monitor: (
            "softprompt-fast monitor -p run -d today.jsonl --report report.html --history history",
            "softprompt-fast monitor -p run --log answers.log --prometheus monitor.prom",
        ),
    },
    "Understand": {
        interpret: (
            "softprompt-fast interpret -p run",
            "softprompt-fast interpret -p run -d test.jsonl --output reading.json --figure reading.svg",
        ),
        prune: (
            "softprompt-fast prune -p run -d reviews.jsonl -o shorter",
            "softprompt-fast prune -p run -d reviews.jsonl -o shorter --min-tokens 4 --validation test.jsonl",
        ),
        similar: (
            "softprompt-fast similar -p prompts -d reviews.jsonl",
            "softprompt-fast similar -p prompts --target first-steps",
        ),
    },
    "Extension": {build: (), clean: ()},
}
"""The commands under the headings of the help, with examples."""

CAUSED_BY_PEOPLE = (LookupError, ValueError, TypeError, OSError, ArithmeticError, ImportError)
"""Exceptions whose message says enough without their name."""


class _Group(TyperGroup):
    """A group in which Ctrl-C ends a command with one line, and commands have the order of GROUPS."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = [_name(command) for commands in GROUPS.values() for command in commands]
        return sorted(super().list_commands(ctx), key=order.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print("interrupted")
            raise typer.Exit(130) from None


def _name(command: Any) -> str:
    return str(command.info.name if isinstance(command, typer.Typer) else command.__name__)


app = typer.Typer(
    cls=_Group,
    help="Tune and use soft prompts for frozen language models.",
    epilog="SOFTPROMPT_FAST_TRACEBACK=1 shows where an error was raised.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"softprompt-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune and use soft prompts for frozen language models."""


for _heading, _commands in GROUPS.items():
    for _command, _examples in _commands.items():
        # An empty line between two lines: a single line break may be dropped.
        _epilog = "\n\n".join(["Examples:", *(f"  {example}" for example in _examples)]) if _examples else None
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, epilog=_epilog, rich_help_panel=_heading)
            continue
        app.command(rich_help_panel=_heading, epilog=_epilog)(_command)


def main() -> None:
    """Entry point of ``softprompt-fast``."""
    try:
        status = app(prog_name="softprompt-fast", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted")
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's errors of usage: an unknown option, a missing value
            _stop_usage(error)
        if os.environ.get("SOFTPROMPT_FAST_TRACEBACK"):
            raise
        _stop(_one_line(error), getattr(error, EXIT_STATUS, 1))
    sys.exit(status if isinstance(status, int) else 0)


def _stop_usage(error: Any) -> NoReturn:
    message = error.format_message().rstrip(".")
    if not message:  # no arguments: the help was shown
        sys.exit(2)
    _stop(f"{message}. See {error.ctx.command_path if error.ctx else 'softprompt-fast'} --help.", 2)


def _stop(message: str, status: int) -> NoReturn:
    """Ends the process with one line."""
    console.print(f"[bold red]error:[/bold red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(status)


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if _out_of_memory(error):
        return f"out of memory; use a smaller --batch-size or --max-length ({text or type(error).__name__})"
    from ..ops.extension.build import BuildUnavailable

    if text and isinstance(error, (*CAUSED_BY_PEOPLE, BuildUnavailable)):
        return text
    return f"{type(error).__name__}: {text} (SOFTPROMPT_FAST_TRACEBACK=1 shows where it was raised)"


def _out_of_memory(error: Exception) -> bool:
    """Whether memory of the GPU, of Python or of PyTorch's allocator on the CPU is exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
