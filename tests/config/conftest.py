"""No setting of this machine reaches the tests of the settings."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def defaults(nothing_is_set: None) -> None:
    """Start every test without settings."""
