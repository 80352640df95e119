"""The service on a machine without the packages of the embedding classifier: it starts in a third of the time."""

from __future__ import annotations

import sys
from typing import Any

import main

missing: dict[str, Any] = {"tokenizers": None}
sys.modules.update(missing)  # None makes an import fail as if the package were not there

app = main.app
