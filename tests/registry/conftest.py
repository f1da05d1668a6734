"""Registries for tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from softprompt_fast.registry import PromptRegistry


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry, made once because that takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    PromptRegistry(folder).prepare()
    return folder / "mlflow.db"


@pytest.fixture
def registry(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PromptRegistry:
    """The default registry of this test, empty."""
    folder = tmp_path / "the registry"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(folder))
    return PromptRegistry()
