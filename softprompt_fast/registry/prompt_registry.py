"""``PromptRegistry``: versions of prompts, which of them answers now, and the way back."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ..base.locations import names_a_version
from ..ops.extension.build import cache_directory
from ..prompts.base_identity import same_base
from ..tasks.task import Task
from .history import PROMOTE, ROLLBACK, Move, moves, promoted
from .record import Record, copy_prompt, current_user, describe, faults, only_prompt, write_record
from .store import RECORD_TAG, Store
from .version_names import LATEST, PRODUCTION, check_alias, check_registered_name, closest, parse

if TYPE_CHECKING:
    from ..tasks.examples import Examples
    from .difference import VersionDifference

logger = logging.getLogger("softprompt_fast")


@dataclass(frozen=True)
class PromptVersion:
    """A version of a prompt in a registry. It never changes; its aliases may move."""

    name: str
    number: int
    record: Record
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    def to_json(self) -> dict[str, Any]:
        return {"version": str(self), "number": self.number, "aliases": list(self.aliases)} | self.record.to_json()


class PromptRegistry:
    """Versions of prompts in MLflow's model registry.

    Args:
        uri: a folder, a database such as ``sqlite:///mlflow.db``, or the address of an MLflow server. None: the
            environment variable ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the current folder, as MLflow itself.

    Raises:
        ImportError: MLflow is not installed.
        ConnectionError: the server does not answer.
    """

    def __init__(self, uri: PathLike[str] | str | None = None) -> None:
        self._store = Store(uri)

    @property
    def uri(self) -> str:
        """The address under which MLflow finds the same registry."""
        return self._store.uri

    def prepare(self) -> None:
        """Makes the registry if there is none, and checks that it can be written.

        Raises:
            OSError: it cannot, or MLflow cannot read it.
        """
        with self._store.writing():
            self._store.names()

    # --- what is in it ---

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return self._store.names()

    def versions(self, name: str) -> list[PromptVersion]:
        """All versions of a name, the oldest first.

        Raises:
            LookupError: there is no such name.
        """
        aliases = self._aliases(name)
        return [self._version(name, raw, aliases) for raw in self._store.versions(name).values()]

    def get(self, version: str) -> PromptVersion:
        """A version by its number, by an alias, or the newest one by ``latest``: ``sentiment@7``.

        Raises:
            ValueError: not the name of a version.
            LookupError: there is no such version; the message lists what there is.
        """
        name, aliases, raw = self._find(version)
        return self._version(name, raw, aliases)

    def history(self, name: str, alias: str = PRODUCTION) -> list[Move]:
        """The recorded promotions and rollbacks of an alias, the oldest first.

        Raises:
            LookupError: there is no such name.
        """
        return moves(self._model(name).tags, alias)

    def verify(self) -> list[str]:
        """Checks that every version has the files that were added, and every alias a version.

        Returns:
            A sentence for each fault; empty: there is none.
        """
        found = []
        for name in self.names():
            aliases, versions = self._aliases(name), self._store.versions(name)
            for number, raw in versions.items():
                found += [f"{name}@{number}: {fault}" for fault in self._faults(raw)]
            for alias, number in sorted(aliases.items()):
                if number not in versions:
                    found.append(f"{name}@{alias}: version {number} is missing")
        return found

    # --- files ---

    def add(
        self,
        folder: PathLike[str] | str,
        name: str,
        *,
        alias: str | None = None,
        parent: str | None = None,
        description: str = "",
        task: Task | None = None,
    ) -> PromptVersion:
        """Copies a prompt into the registry as the next version of a name.

        Settings, scores and fingerprints of the rows are read from the files of ``tune`` or ``search`` beside the
        prompt's folder.

        Args:
            folder: an adapter folder, plain or deep, or a folder with one prompt, such as the output of ``tune``.
            name: letters, digits, ``_`` and ``-``; made if it is new.
            alias: an alias that names the version from now on.
            parent: the version that the prompt was tuned from. None: the version that ``init`` names, if it names one.
            task: of a prompt without ``task.json``.

        Raises:
            FileNotFoundError: no prompt in the folder, or no task.
            ValueError: several prompts, or a name that is not allowed.
            LookupError: there is no such parent.
            OSError: the registry cannot be written.
        """
        check_registered_name(name)
        if alias is not None:
            check_alias(alias)
        source = only_prompt(Path(folder))
        with tempfile.TemporaryDirectory() as scratch:
            copied = Path(scratch) / name
            copy_prompt(source, copied, task)
            record = describe(source, copied, name, parent=parent, description=description)
            with self._store.writing():
                record = replace(record, parent=self._parent(parent, record))
                write_record(copied, record)
                number = self._store.create(name, copied, record)
                if alias is not None:
                    self._move(name, alias, number, PROMOTE)
        return self.get(f"{name}@{number}")

    def fetch(self, version: str, folder: PathLike[str] | str | None = None) -> Path:
        """The folder of a version's prompt, after a check of its content hash.

        Args:
            folder: a new folder to copy the prompt into. None: the registry's own copy, which is not to be changed,
                or a copy in the cache directory if the registry is on a server.

        Raises:
            LookupError: there is no such version.
            FileExistsError: ``folder`` exists already.
            ValueError: the files are not those that were added.
        """
        if folder is not None and Path(folder).exists():
            raise FileExistsError(f"{folder} already exists; choose another folder")
        name, _, raw = self._find(version)
        record = self._record(raw)
        if folder is not None:
            target = Path(folder)
            self._checked_download(raw, record, target)
        elif (own := self._store.folder(raw)) is not None:
            _check(own, record, f"{name}@{raw.version}")
            target = own
        else:
            target = cache_directory() / "versions" / record.content_hash[:32] / f"{raw.version}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{name}.lock")):  # several processes start with one version
                if not target.is_dir() or faults(target, record):
                    shutil.rmtree(target, ignore_errors=True)
                    self._checked_download(raw, record, target)
        return target

    def _checked_download(self, raw: Any, record: Record, target: Path) -> None:
        own = self._store.folder(raw)
        if own is not None:
            _check(own, record, f"{record.name}@{raw.version}")
        self._store.download(raw, target)
        _check(target, record, f"{record.name}@{raw.version}")

    # --- aliases ---

    def promote(
        self,
        version: str,
        alias: str = PRODUCTION,
        *,
        rows: Examples | None = None,
        model: str | None = None,
        force: bool = False,
        **options: Any,
    ) -> Move:
        """Makes an alias name a version, after checks against the version that it names now.

        Args:
            rows: labelled rows, on which both versions are scored.
            model: the base model; None: the one that the version was tuned on.
            force: promote it whatever the checks say; what they say is recorded.
            options: ``batch_size``, ``dtype``, ``device``, as in :meth:`diff`.

        Raises:
            LookupError: there is no such version.
            ValueError: the version's files were altered, its base model differs from that of the alias's version, or
                its score on the rows is significantly worse.
        """
        check_alias(alias)
        name, aliases, raw = self._find(version)
        number, record = int(raw.version), self._record(raw)
        self.fetch(f"{name}@{number}")
        present = aliases.get(alias)
        if present == number:
            raise ValueError(f"{name}@{alias} is version {number} already")
        objections = []
        if present is not None:
            objections = self._objections(self.get(f"{name}@{present}"), number, record, rows, model, options)
        if objections and not force:
            raise ValueError(
                f"{name}@{number} is not promoted to {alias!r}: {'; '.join(objections)}; force=True (--force) promotes "
                "it nevertheless"
            )
        with self._store.writing():
            if self._aliases(name).get(alias) != present:
                raise ValueError(f"{name}@{alias} was version {present} during the checks, and was moved; try again")
            return self._move(name, alias, number, PROMOTE, "; ".join(objections))

    def rollback(self, name: str, alias: str = PRODUCTION) -> Move:
        """Makes an alias name the version that it named before the last promotion; repeated, the one before that.

        Raises:
            LookupError: there is no such name or alias, or nothing to return to.
            ValueError: the earlier version's files were altered or are missing.
        """
        with self._store.writing():
            current = self._aliases(name).get(alias)
            if current is None:
                raise LookupError(f"{name!r} has no alias {alias!r} in {self._store}")
            stack = promoted(self.history(name, alias), current)
            if len(stack) < 2:
                raise LookupError(f"{name}@{alias} is version {current}, and no earlier version is recorded")
            self.fetch(f"{name}@{stack[-2]}")
            return self._move(name, alias, stack[-2], ROLLBACK)

    def diff(
        self, first: str, second: str, *, rows: Examples | None = None, model: str | None = None, **options: Any
    ) -> VersionDifference:
        """How two versions differ: base model, settings, scores, vectors, and on rows their answers.

        Args:
            first, second: names of versions, or folders of prompts.
            rows: rows on which both answer; with labels, they are scored and compared by a paired test.
            model: the base model; None: the one that the first was tuned on.
            options: ``batch_size`` (32), ``dtype`` ("auto"), ``device`` (None), ``progress``.

        Raises:
            LookupError: there is no such version.
        """
        from .difference import compare_versions

        sides = [self._side(one) for one in (first, second)]
        return compare_versions(sides[0], sides[1], rows=rows, model=model, **options)

    # --- parts of the above ---

    def _side(self, text: str) -> tuple[str, Path, Record]:
        """A version or a folder: what it is called, its files and its record."""
        if not Path(text).exists():
            version = self.get(text)
            return str(version), self.fetch(str(version)), version.record
        folder = only_prompt(Path(text))
        return str(text), folder, describe(folder, folder, folder.name, parent=None, description="")

    def _objections(
        self,
        present: PromptVersion,
        number: int,
        record: Record,
        rows: Examples | None,
        model: str | None,
        options: dict[str, Any],
    ) -> list[str]:
        """What speaks against a version in the place of the present one."""
        if not _one_base(present.record, record):
            return [
                f"its base model {record.base_model!r} ({record.base_fingerprint}) is not that of {present}, "
                f"{present.record.base_model!r} ({present.record.base_fingerprint})"
            ]
        if rows is None:
            return []
        from .answers import answer_with_both, compare_answers

        folders = [self.fetch(str(present)), self.fetch(f"{record.name}@{number}")]
        answered = answer_with_both(folders, [present.record, record], rows, model, scores_only=True, **options)
        test = compare_answers(answered)
        assert test is not None
        if not test.significantly_worse:
            return []
        return [
            f"its {test.metric} is worse than that of {present} by {test.worse_by:.4f} on {test.rows} rows "
            f"({test.test}, p = {test.p_value:.2g})"
        ]

    def _move(self, name: str, alias: str, number: int, action: str, forced: str = "") -> Move:
        before = self._aliases(name).get(alias)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        move = Move(action, name, alias, before, number, current_user(), now, forced)
        self._store.set_alias(name, alias, number)
        self._store.set_tag(name, *move.tag())
        return move

    def _parent(self, given: str | None, record: Record) -> str | None:
        if given is not None:
            return str(self.get(given))
        init = record.settings.get("init")
        if not isinstance(init, str) or not names_a_version(init):
            return None
        try:
            return str(self.get(init))
        except LookupError:
            logger.warning("the prompt was tuned from %s, which is not in %s: it gets no parent", init, self._store)
            return None

    def _model(self, name: str) -> Any:
        model = self._store.model(name)
        if model is None:
            known = self.names()
            shown = f"it has {', '.join(known)}" if known else "it is empty"
            raise LookupError(f"no prompt {name!r} in the registry {self._store}: {shown}{closest(name, known)}")
        return model

    def _aliases(self, name: str) -> dict[str, int]:
        return {alias: int(number) for alias, number in self._model(name).aliases.items()}

    def _find(self, version: str) -> tuple[str, dict[str, int], Any]:
        """The name, its aliases and MLflow's version."""
        name, wanted = parse(version)
        aliases = self._aliases(name)
        number = int(wanted) if wanted.isdigit() else aliases.get(wanted)
        if wanted.lower() == LATEST:
            number = max(self._store.versions(name), default=None)
        raw = None if number is None else self._store.version(name, number)
        if raw is None:
            versions = list(self._store.versions(name))
            shown = [f"versions {_ranges(versions)}" if versions else "no version"]
            shown += [f"aliases {', '.join(sorted(aliases))}"] if aliases else ["no alias"]
            raise LookupError(
                f"{name!r} has no version {wanted!r} in the registry {self._store}; it has {' and '.join(shown)}"
                f"{closest(wanted, [*map(str, versions), *aliases])}"
            )
        return name, aliases, raw

    def _version(self, name: str, raw: Any, aliases: dict[str, int]) -> PromptVersion:
        number = int(raw.version)
        own = tuple(sorted(alias for alias, other in aliases.items() if other == number))
        return PromptVersion(name, number, self._record(raw), own)

    def _record(self, raw: Any) -> Record:
        text = raw.tags.get(RECORD_TAG)
        if text is None:
            raise ValueError(f"{raw.name}@{raw.version} was not added by softprompt-fast: it has no record")
        return Record.from_json(json.loads(text))

    def _faults(self, raw: Any) -> list[str]:
        try:
            record = self._record(raw)
            own = self._store.folder(raw)
            if own is not None:
                return faults(own, record)
            with tempfile.TemporaryDirectory() as scratch:
                copied = Path(scratch) / raw.name
                self._store.download(raw, copied)
                return faults(copied, record)
        except (OSError, ValueError) as error:
            return [str(error)]


def _one_base(a: Record, b: Record) -> bool:
    if a.base_fingerprint is not None and b.base_fingerprint is not None:
        return same_base(a.base_fingerprint, b.base_fingerprint)
    return None in (a.base_model, b.base_model) or a.base_model == b.base_model


def _check(folder: Path, record: Record, version: str) -> None:
    found = faults(folder, record)
    if found:
        raise ValueError(f"{version} cannot be used: {'; '.join(found)}")


def _ranges(numbers: Sequence[int]) -> str:
    """Such as "1 to 4, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
