"""The service with a fault in it that nobody thought of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import api
import main


def fail(fields: Mapping[str, Any], _settings: object) -> None:
    raise RuntimeError(f"unexpected: {fields}")


api.parse_request = fail  # type: ignore[assignment]
app = main.app
