"""A stand-in for the Hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_stand_in import HubStandIn, running_hub, use_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub on this machine with an empty cache; the current folder is empty too."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with running_hub() as running:
        use_hub(monkeypatch, running.url, tmp_path / "cache")
        yield running
