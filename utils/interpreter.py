"""Ends a program with one sentence if its Python has no packages. It imports nothing that such a Python lacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def require_packages() -> None:
    """Exit with 2 if this Python cannot run the product. Programs call it before their other imports."""
    again = "run make venv, then . .venv/bin/activate, and the same command again"
    _require(["pymongo"], f"the packages of requirements.txt: {again}")


def require_development_packages() -> None:
    """Exit with 2 if this Python cannot run the benchmarks."""
    packages = ["psutil", "scipy", "sklearn", "sqlalchemy"]
    again = "run make bench ARGS=--help, which installs them, then . .venv/bin/activate, and the same command again"
    _require(packages, f"packages of requirements-dev.txt or requirements-index.txt: {again}")


def _require(packages: list[str], lacking: str) -> None:
    if not all(map(importlib.util.find_spec, packages)):
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name
        sys.stderr.write(f"{name}: {sys.executable} lacks {lacking}.\n")
        sys.exit(2)
