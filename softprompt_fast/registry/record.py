"""What a version holds beside its files: where its prompt comes from, and how good it is."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..base.files import read_json, write_json
from ..base.machine import PACKAGES, package_versions
from ..base.version import __version__
from ..prompts.multitask_files import split_task
from ..prompts.peft_files import prompts_by_name, read_base, read_config
from ..prompts.run_files import RECORD_FILE, run_facts
from ..tasks.task import TASK_FILE, Task

# The content hash does not cover RECORD_FILE; it must equal the registry's record.


@dataclass(frozen=True)
class Record:
    """The facts of a version. Those that nobody wrote down are None or empty."""

    name: str
    """The registered name."""
    content_hash: str
    """SHA-256 of the version's files."""
    method: str
    """PEFT's name of the method, such as PROMPT_TUNING."""
    virtual_tokens: int
    base_model: str | None
    base_fingerprint: str | None
    """Of the base model's weights, see :func:`softprompt_fast.prompts.base_identity.base_fingerprint`."""
    train_rows: str | None = None
    """Number and fingerprint of the training rows."""
    held_out_rows: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    """Held-out scores with their intervals."""
    scores_without_prompt: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries when the version was added."""
    parent: str | None = None
    """The version that the prompt was tuned from, such as ``sentiment@6``."""
    author: str = ""
    added: str = ""
    """Time, in UTC."""
    description: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        known = {one.name for one in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def only_prompt(folder: Path) -> Path:
    """The adapter folder itself, or the only one in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    folders = prompts_by_name(folder)
    if len(folders) != 1:
        raise ValueError(
            f"a version must be one prompt, got {folder} with {', '.join(folders)}; add each by its folder"
        )
    (path,) = folders.values()
    if split_task(path)[1] is not None:
        raise ValueError(f"a version must be a folder, got a task of one, {path}; load the task's prompt and save it")
    return path


def copy_prompt(source: Path, target: Path, task: Task | None) -> None:
    """Copies the files of an adapter folder, which later changes of the folder cannot reach.

    Args:
        task: of a prompt that has no ``task.json``.

    Raises:
        ValueError: the prompt has no task and none is given, or it has one and another is given.
    """
    has_task = (source / TASK_FILE).is_file()
    if has_task and task is not None:
        raise ValueError(f"`task` cannot be given for a prompt that has a {TASK_FILE}: {source}")
    if not has_task and task is None:
        raise FileNotFoundError(
            f"{source} must hold a {TASK_FILE}, which says how rows are read; without one, describe the task "
            "(--template and --label-word, or `task`)"
        )
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name != RECORD_FILE:
            shutil.copyfile(file, target / file.name)
    if task is not None:
        task.save(target)
    Task.load(target)  # a task.json that cannot be read is refused here


def content_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of a version's files, without its record."""
    whole = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file() and file.name != RECORD_FILE):
        whole.update(f"{hashlib.sha256(file.read_bytes()).hexdigest()} {file.name}\n".encode())
    return whole.hexdigest()


def describe(folder: Path, copied: Path, name: str, *, parent: str | None, description: str) -> Record:
    """The record of a prompt that becomes a version.

    Args:
        folder: the prompt's own folder; the files of its run are beside it.
        copied: the copy that the version will hold.
    """
    config = read_config(copied, None)
    base_model, fingerprint = read_base(copied)
    run = run_facts(folder)
    settings = run.get("settings") or {}
    return Record(
        name=name,
        content_hash=content_hash(copied),
        method=str(config.get("peft_type")),
        virtual_tokens=int(config.get("num_virtual_tokens") or 0),
        base_model=Task.load(copied).model or base_model,
        base_fingerprint=fingerprint,
        train_rows=run.get("train_rows"),
        held_out_rows=run.get("held_out_rows"),
        settings=settings,
        scores=run.get("after") or {},
        scores_without_prompt=run.get("before") or {},
        seed=settings.get("seed"),
        libraries={"softprompt_fast": __version__, "python": platform.python_version()} | package_versions(PACKAGES),
        parent=parent,
        author=current_user(),
        added=datetime.now(UTC).isoformat(timespec="seconds"),
        description=description,
    )


def write_record(folder: Path, record: Record) -> None:
    write_json(folder / RECORD_FILE, record.to_json())


def faults(folder: Path, record: Record) -> list[str]:
    """What is wrong with the files of a version; empty: nothing."""
    if not folder.is_dir():
        return [f"the folder {folder} is missing"]
    try:
        same = content_hash(folder) == record.content_hash
    except OSError as error:
        return [f"{folder} cannot be read: {error}"]
    found = [] if same else [f"the files in {folder} are not those that were added (another content hash)"]
    stored = read_json(folder / RECORD_FILE)
    if stored is None:
        found.append(f"{folder / RECORD_FILE} is missing or not readable")
    elif {key: stored.get(key, value) for key, value in record.to_json().items()} != record.to_json():
        found.append(f"{folder / RECORD_FILE} differs from the registry's record")
    return found


def current_user() -> str:
    """The name of whoever runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no name for this user's number
        return str(os.getuid()) if hasattr(os, "getuid") else ""
