"""Where a prompt is: a folder, a version in the registry (``sentiment@production``), or on the Hub (``user/repo``)."""

from __future__ import annotations

import re
from importlib import import_module
from os import PathLike
from pathlib import Path

from . import hub

VERSION_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,127})@([A-Za-z0-9_][A-Za-z0-9_-]{0,127})")
"""A registered name and a number or an alias; the same characters as in the name of a prompt."""
REGISTRY = "softprompt_fast.registry.prompt_registry"
"""The module that finds versions. It is a higher layer, so it is imported by its name, when a version is asked for."""


def names_a_version(source: PathLike[str] | str) -> bool:
    """Whether a text is the name of a version. A file or folder of this name comes first."""
    return VERSION_NAME.fullmatch(str(source)) is not None and not Path(source).exists()


def is_remote(source: PathLike[str] | str) -> bool:
    """Whether a text names a version in the registry or a repository on the Hub, and no path."""
    return names_a_version(source) or hub.parse(source) is not None


def located(
    source: PathLike[str] | str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike[str] | str | None = None,
) -> Path:
    """The path of a prompt that is given by its path, by the name of its version or by its repository on the Hub.

    Args:
        revision: branch, tag or commit of the repository; ``user/repo@revision`` says the same.
        token: for private repositories; None: the one of the Hub's login.
        cache_dir: where the repository's files are kept; None: the Hub's cache.

    Raises:
        ImportError: a version is named, and MLflow is not installed.
        LookupError: there is no such version.
        ValueError: the version's files were altered; a revision of something else than a repository, or two revisions.
        FileNotFoundError: there is no such repository or revision.
        ConnectionError: the Hub does not answer, and its cache does not hold the files.
    """
    name = hub.parse(source)
    if name is not None:
        if revision is not None and name.revision not in (None, revision):
            raise ValueError(f"`revision` must be {name.revision!r} as in {str(source)!r}, got {revision!r}")
        return hub.download(name._replace(revision=revision or name.revision), token=token, cache_dir=cache_dir)
    if revision is not None:
        raise ValueError(f"`revision` must be None unless a repository on the Hub is named, got {str(source)!r}")
    if not names_a_version(source):
        return Path(source)
    folder: Path = import_module(REGISTRY).PromptRegistry().fetch(str(source))
    return folder
