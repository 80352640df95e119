"""Hides the product's settings from processes that run functions of users."""

from __future__ import annotations

import os

from config.settings import known_environment_names


def forget_settings() -> None:
    """Remove every variable of this product, including keys and addresses, from the environment of this process."""
    for name in known_environment_names():
        os.environ.pop(name, None)
