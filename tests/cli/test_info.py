"""``info``: what bug reports need."""

from __future__ import annotations

import torch
from support.tiny_reviews import run

from softprompt_fast.base.machine import environment, package_versions
from softprompt_fast.cli.info import PACKAGES


def test_info_shows_versions_hardware_and_the_backend() -> None:
    lines = run("info").output.splitlines()
    names = [line[:18].strip() for line in lines]
    hardware = ["compiler", "torch CUDA", "CUDA toolkit", "GPUs", "cache", "threads", "backend", "reason"]
    assert names[:3] == ["softprompt_fast", "python", "platform"]
    assert names[3 : 3 + len(PACKAGES) + len(hardware)] == [*PACKAGES, *hardware]
    assert lines[3].split()[-1] == torch.__version__


def test_versions_of_missing_packages_are_told() -> None:
    assert package_versions(["torch", "no-such-package"]) == {
        "torch": torch.__version__,
        "no-such-package": "not installed",
    }
    facts = environment(torch.device("cpu"), "native")
    assert facts["versions"]["torch"] == torch.__version__ and facts["backend"] == "native" and facts["device"]
