"""The service on a machine where requirements-local-embedding.txt is not installed."""

from __future__ import annotations

import sys
from typing import Any

import main

missing: dict[str, Any] = {"tokenizers": None}
sys.modules.update(missing)  # None makes an import fail as if the package were not there

app = main.app
