"""Packages that import their modules when a name is first used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest


@pytest.mark.parametrize("package", ["softprompt_fast", "softprompt_fast.tuning"])
def test_every_exported_name_is_there(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is getattr(module, name) is vars(module)[name]
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


def test_importing_a_package_imports_no_torch() -> None:
    code = "import sys, softprompt_fast, softprompt_fast.tuning.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
