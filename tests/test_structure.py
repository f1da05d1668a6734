"""Limits that keep files small and packages separate. CONTRIBUTING.md states them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "softprompt_fast"
TOP_MODULES = 4
FILE_LINES = 450
FUNCTION_LINES = 80
NATIVE = (".h", ".cuh", ".cpp", ".cu")
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source tree")


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    count = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        count -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return count


def imported_from_the_package(file: Path) -> Iterator[tuple[str, str, Path | None]]:
    """Imports of other modules of the package: the name, what it is called in the file, its path if it is a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            base = file.parents[node.level - 1]
        elif parts and parts[0] == PACKAGE.name:
            base, parts = PACKAGE, parts[1:]
        else:
            continue
        for alias in node.names:
            module = base.joinpath(*parts, f"{alias.name}.py")
            yield alias.name, alias.asname or alias.name, module if module.is_file() else None


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_few_modules_at_the_top_of_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_MODULES


def test_files_are_short() -> None:
    files = python_files("softprompt_fast", "tests")
    files += [file for file in sorted((ROOT / "csrc").rglob("*")) if file.suffix in NATIVE]
    counts = {name_of(file): len(file.read_text().splitlines()) for file in files}
    assert len(counts) > 100
    assert {name: count for name, count in counts.items() if count > FILE_LINES} == {}


def test_functions_are_short() -> None:
    counts = {
        f"{name_of(file)}:{function.name}": lines_without_docstring(function)
        for file in python_files("softprompt_fast", "tests", "benchmarks")
        for function in functions(ast.parse(file.read_text()))
    }
    assert len(counts) > 500
    assert {name: count for name, count in counts.items() if count > FUNCTION_LINES} == {}


def test_no_module_imports_a_private_name_of_another() -> None:
    private = []
    for file in python_files("softprompt_fast"):
        modules = set()
        for name, local, module in imported_from_the_package(file):
            if module is not None:
                modules.add(local)
            if is_private(name):
                private.append(f"{name_of(file)}: {name}")
        for node in ast.walk(ast.parse(file.read_text())):
            used = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
            if used and is_private(node.attr):
                private.append(f"{name_of(file)}: {node.value.id}.{node.attr}")
    assert private == []


def test_every_package_says_what_it_is_for() -> None:
    packages = sorted(PACKAGE.rglob("__init__.py"))
    assert len(packages) > 10
    assert [name_of(file) for file in packages if not ast.get_docstring(ast.parse(file.read_text()))] == []
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert folders == {file.parent for file in packages}
