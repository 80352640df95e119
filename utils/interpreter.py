"""Ends a program with one sentence if its Python has no packages. It imports nothing that such a Python lacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def require_packages() -> None:
    """Exit with 2 if this Python cannot run the product. Programs call it before their other imports."""
    if not importlib.util.find_spec("pymongo"):
        sys.stderr.write(
            f"{Path(sys.argv[0]).name}: {sys.executable} lacks the packages of requirements.txt: run make venv, then "
            ". .venv/bin/activate, and the same command again.\n"
        )
        sys.exit(2)
