"""Prompts on the Hub: names such as ``user/repo@revision#prompt``, the download of their files, and plain errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?(?:#([\w-]+))?")
"""A repository, its revision, and one of its prompts. A version in the registry has no slash."""
PROMPT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "task.json",
    "profile.json",
    "composition.json",
)
"""What is downloaded of a prompt. No pickle, and no weights of a model that is in the same repository."""
TOO_DEEP = "*/*/*"
"""Files that belong to no prompt: those are in the repository itself or in its folders."""
CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Libraries through which versions of huggingface_hub talk to the Hub; their errors name no argument."""


class HubName(NamedTuple):
    """The parts of a name."""

    repository: str
    revision: str | None
    prompt: str | None


def parse(source: PathLike[str] | str) -> HubName | None:
    """The parts of the name of a repository; None: a path.

    A path comes first: if it or its first folder is on this machine, the text is a path.
    """
    text = Path(source).as_posix()
    match = NAME.fullmatch(text)
    if match is None or Path(source).exists() or Path(text.partition("/")[0]).exists():
        return None
    return HubName(match[1], match[2], match[3])


def download(name: HubName, *, token: str | bool | None = None, cache_dir: PathLike[str] | str | None = None) -> Path:
    """The folder in the Hub's cache with the prompt of a repository, or with all of its prompts.

    Only missing files are downloaded. Without the network, or with ``HF_HUB_OFFLINE``, the cache answers.

    Raises:
        FileNotFoundError: no such repository, revision or prompt, or none that may be read.
        ConnectionError: the Hub does not answer, and the cache does not hold the files.
    """
    from huggingface_hub import snapshot_download

    with plain_errors(name.repository, name.revision):
        folder = snapshot_download(
            name.repository,
            revision=name.revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            allow_patterns=[*PROMPT_FILES, *(f"*/{file}" for file in PROMPT_FILES)],
            ignore_patterns=[TOO_DEEP],
        )
    root = Path(folder)
    if not any(root.glob(PROMPT_FILES[1])) and not any(root.glob(f"*/{PROMPT_FILES[1]}")):
        raise FileNotFoundError(
            f"{name.repository} on the Hub must hold {PROMPT_FILES[0]} and {PROMPT_FILES[1]}; pickles are not read"
        )
    if name.prompt is None or (root / name.prompt).is_dir():
        return root / (name.prompt or "")
    if name.prompt.isdigit():  # a task of a multitask prompt
        return root.with_name(f"{root.name}#{name.prompt}")
    known = sorted(file.parent.name for file in root.glob(f"*/{PROMPT_FILES[1]}")) or ["one, without a name"]
    raise FileNotFoundError(f"{name.repository} on the Hub has no prompt {name.prompt!r}; it has {', '.join(known)}")


def folder_name(folder: Path) -> str:
    """The name of a folder; that of the repository if the folder is a commit in the Hub's cache."""
    folder = folder.resolve()
    _, number, task = folder.name.partition("#")
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return folder.name
    return repository.split("--")[-1] + number + task


@contextmanager
def plain_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub's errors, which have many lines, into one line each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f"{repository} on the Hub must be requested from its owner before it is read") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is no folder here and no repository on the Hub that you can read; "
            "if it is private, log in or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} on the Hub has no revision {revision!r}") from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repository} on the Hub cannot be reached, because HF_HUB_OFFLINE is set") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"{_unreached(repository, error)}, and the cache does not hold its files") from error
    except errors.HfHubHTTPError as error:
        raise OSError(f"{repository} on the Hub: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise ConnectionError(f"{_unreached(repository, error)} ({_first_line(error)})") from error


def _unreached(repository: str, error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    offline = isinstance(error.__cause__, OfflineModeIsEnabled)
    reason = "because HF_HUB_OFFLINE is set" if offline else "because the Hub does not answer"
    return f"{repository} is no folder here and cannot be downloaded, {reason}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
