"""The values of settings, secrets included."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, SecretStr


def read(settings: BaseModel, field: str) -> Any:
    """Return the value of *field*; of a secret, its text."""
    value = getattr(settings, field)
    return value.get_secret_value() if isinstance(value, SecretStr) else value
