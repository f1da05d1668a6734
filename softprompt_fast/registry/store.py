"""Where versions are kept: MLflow's model registry, in an embedded SQLite file or on any server of MLflow."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlparse
from urllib.request import urlopen

from ..base.extras import require
from .record import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = "MLFLOW_TRACKING_URI"
DATABASE = "mlflow.db"
"""The file that MLflow, too, uses in the current folder if it is told nothing."""
ARTIFACTS = "mlartifacts"
EXPERIMENT = "softprompt_fast"
KIND, PROMPT = "softprompt_fast.kind", "soft prompt"
"""The tag by which our registered models are told from others."""
RECORD_TAG = "softprompt_fast.record"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # this library sends nothing to anybody
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where results are written
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # prompts are small
}
"""Settings of MLflow that hold unless the environment says otherwise."""
LARGEST_NUMBER = 2**31
"""Databases store numbers of versions below this."""
TIMEOUT = 3.0
"""Seconds after which a server that does not answer is given up."""


class Store:
    """The calls of MLflow that a registry of prompts needs.

    In an SQLite file, one process writes at a time, under a lock of the operating system, which a killed process
    releases. A version is created last, in one transaction, after its files are complete: whatever is killed before
    leaves no version.

    Args:
        uri: a folder, a database such as ``sqlite:///mlflow.db``, or the address of a server. None: the environment
            variable ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the current folder.

    Raises:
        ImportError: MLflow is not installed.
        ConnectionError: the server does not answer.
    """

    def __init__(self, uri: PathLike[str] | str | None = None) -> None:
        require("production", "mlflow", "sqlalchemy", "alembic", purpose="the registry")
        given = str(uri) if uri is not None else os.environ.get(ENVIRONMENT) or f"sqlite:///{DATABASE}"
        self.file = _database_file(given)
        self.uri = given if self.file is None else f"sqlite:///{self.file}"
        self._client: MlflowClient | None = None
        if self.uri.startswith(("http://", "https://")):
            _check_answers(self.uri)

    def __str__(self) -> str:
        return self.uri if self.file is None else str(self.file)

    @property
    def client(self) -> MlflowClient:
        """MLflow's client.

        Raises:
            FileNotFoundError: there is no registry yet.
        """
        if self._client is None:
            if self.file is not None and not self.file.is_file():
                raise FileNotFoundError(
                    f"there is no registry at {self.file}; `softprompt-fast versions add` makes it, --registry or "
                    f"{ENVIRONMENT} names another one"
                )
            self._client = _client(self.uri)
        return self._client

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other writers out, and makes the database if there is none."""
        if self.file is None:
            with self.reading():
                yield
            return
        from filelock import FileLock

        lock = FileLock(self.file.with_name(f".{self.file.name}.lock"))
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise OSError(f"the registry {self} must be in a folder that can be written: {error}") from error
        try:
            if not self.file.is_file():
                _make_database(self.file)
            with self.reading():
                yield
        finally:
            lock.release()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns errors of MLflow and of the database into one line."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise OSError(f"the registry {self} failed: {lines[0]}") from error

    # --- reading ---

    def names(self) -> list[str]:
        """The registered names of prompts, sorted; other models of the registry are left out."""
        names: list[str] = []
        token: str | None = None
        while token != "":
            with self.reading():
                page = self.client.search_registered_models(max_results=100, page_token=token)
            names += [model.name for model in page if model.tags.get(KIND) == PROMPT]
            token = page.token or ""
        return sorted(names)

    def model(self, name: str) -> Any:
        """The registered model of a name, with its aliases and tags; None: there is none, or it is no prompt."""
        model = self._existing(lambda: self.client.get_registered_model(name))
        return model if model is not None and model.tags.get(KIND) == PROMPT else None

    def _existing(self, read: Callable[[], Any]) -> Any:
        """What a call reads; None: MLflow does not have it."""
        from mlflow.exceptions import MlflowException

        with self.reading():
            try:
                return read()
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def versions(self, name: str) -> dict[int, Any]:
        """MLflow's versions of a name by their numbers."""
        found: dict[int, Any] = {}
        token: str | None = None
        while token != "":
            with self.reading():
                page = self.client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
            found |= {int(version.version): version for version in page}
            token = page.token or ""
        return dict(sorted(found.items()))

    def version(self, name: str, number: int) -> Any:
        """MLflow's version of a number; None: there is none."""
        if number >= LARGEST_NUMBER:
            return None
        return self._existing(lambda: self.client.get_model_version(name, str(number)))

    def folder(self, version: Any) -> Path | None:
        """The folder of a version's files, if this machine can read it; it must not be changed."""
        source = urlparse(version.source)
        return Path(unquote(source.path)) if source.scheme in ("", "file") else None

    def download(self, version: Any, target: Path) -> None:
        """Copies the files of a version into a folder that does not exist yet; it appears whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            own = self.folder(version)
            if own is not None:
                copied = Path(scratch) / target.name
                copied.mkdir()
                for file in own.iterdir():
                    shutil.copyfile(file, copied / file.name)  # not its mode: a copy can be changed
            else:
                from mlflow.artifacts import download_artifacts

                with self.reading():
                    copied = Path(
                        download_artifacts(artifact_uri=version.source, dst_path=scratch, tracking_uri=self.uri)
                    )
            os.replace(copied, target)

    # --- writing, inside ``writing()`` ---

    def create(self, name: str, files: Path, record: Record) -> int:
        """Copies files into the registry and makes them a version; returns its number."""
        from mlflow.entities import Metric, Param, RunTag

        client = self.client
        run = client.create_run(self._experiment(), run_name=name, tags={KIND: PROMPT})
        run_id = run.info.run_id
        time = run.info.start_time
        numbers = {key: value for key, value in record.scores.items() if isinstance(value, int | float)}
        client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), time, 0) for key, value in numbers.items()],
            params=[Param(key, str(value)[:6000]) for key, value in _parameters(record).items()],
            tags=[RunTag(f"softprompt_fast.{key}", str(value)) for key, value in _tags(record).items()],
        )
        client.log_artifacts(run_id, str(files), name)
        client.set_terminated(run_id)
        if self.model(name) is None:
            self._register(name)
        version = client.create_model_version(
            name,
            f"{run.info.artifact_uri}/{name}",
            run_id,
            tags={f"softprompt_fast.{key}": str(value) for key, value in _tags(record).items()}
            | {RECORD_TAG: json.dumps(record.to_json(), sort_keys=True)},
            description=record.description or None,
        )
        self._protect(version)
        return int(version.version)

    def _register(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name, tags={KIND: PROMPT})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if self.model(name) is None:
                raise ValueError(f"{name!r} is already the name of another model in {self}; choose another") from error

    def _experiment(self) -> str:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return str(experiment.experiment_id)
        place = None if self.file is None else (self.file.parent / ARTIFACTS / EXPERIMENT).as_uri()
        return str(self.client.create_experiment(EXPERIMENT, artifact_location=place))

    def _protect(self, version: Any) -> None:
        """Files of a version are read-only, so that nobody changes them by accident."""
        folder = self.folder(version)
        if self.file is not None and folder is not None:
            for file in folder.iterdir():
                file.chmod(0o444)

    def set_alias(self, name: str, alias: str, number: int) -> None:
        self.client.set_registered_model_alias(name, alias, str(number))

    def set_tag(self, name: str, key: str, value: str) -> None:
        self.client.set_registered_model_tag(name, key, value)


def _database_file(uri: str) -> Path | None:
    """The SQLite file of a registry in a folder or file; None: a server or another database."""
    parts = urlparse(uri)
    if parts.scheme == "sqlite":
        return Path(uri.removeprefix("sqlite:///")).absolute()
    if uri == "databricks" or ("://" in uri and parts.scheme != "file"):
        return None
    path = Path(unquote(parts.path) if parts.scheme == "file" else uri).expanduser().absolute()
    return path if path.suffix == ".db" else path / DATABASE


def _client(uri: str) -> MlflowClient:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # mlflow sets its level when it is imported
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(file: Path) -> None:
    """Makes an empty database of MLflow aside and moves it into place: a killed process leaves nothing half-made."""
    for left in file.parent.glob(f".{file.name}.*/"):  # of a killed process: only one makes a database at a time
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        made = Path(scratch) / file.name
        client = _client(f"sqlite:///{made}")
        client.search_registered_models(max_results=1)
        client.search_experiments(max_results=1)
        os.replace(made, file)


def _check_answers(uri: str) -> None:
    """Asks a server for a sign of life, because MLflow's own client tries for minutes.

    Raises:
        ConnectionError: there is none.
    """
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT):
            return
    except HTTPError as error:
        if error.code < 500:
            return  # it answers; what it allows, MLflow's client finds out
        reason: object = f"/health gave status {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
    raise ConnectionError(f"the registry {uri} must be an MLflow server that answers: {reason}")


def _parameters(record: Record) -> Mapping[str, Any]:
    """What MLflow's pages show as parameters."""
    return {"virtual_tokens": record.virtual_tokens, "method": record.method} | record.settings


def _tags(record: Record) -> Mapping[str, Any]:
    """What MLflow's pages show as tags."""
    facts = {
        "content_hash": record.content_hash,
        "base_model": record.base_model,
        "base_fingerprint": record.base_fingerprint,
        "train_rows": record.train_rows,
        "parent": record.parent,
        "author": record.author,
    }
    return {key: value for key, value in facts.items() if value}
