"""Where a prompt is: a folder, or a version in the registry by its name, such as ``sentiment@production``."""

from __future__ import annotations

import re
from importlib import import_module
from os import PathLike
from pathlib import Path

VERSION_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,127})@([A-Za-z0-9_][A-Za-z0-9_-]{0,127})")
"""A registered name and a number or an alias; the same characters as in the name of a prompt."""
REGISTRY = "softprompt_fast.registry.prompt_registry"
"""The module that finds versions. It is a higher layer, so it is imported by its name, when a version is asked for."""


def names_a_version(source: PathLike[str] | str) -> bool:
    """Whether a text is the name of a version. A file or folder of this name comes first."""
    return VERSION_NAME.fullmatch(str(source)) is not None and not Path(source).exists()


def located(source: PathLike[str] | str) -> Path:
    """The path of a prompt that is given by its path or by the name of its version.

    Raises:
        ImportError: a version is named, and MLflow is not installed.
        LookupError: there is no such version.
        ValueError: the version's files were altered.
    """
    if not names_a_version(source):
        return Path(source)
    folder: Path = import_module(REGISTRY).PromptRegistry().fetch(str(source))
    return folder
