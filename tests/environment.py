"""The environment of programs that tests start."""

from __future__ import annotations

import os

from config.settings import known_environment_names


def clean_environment() -> dict[str, str]:
    """Return the environment of this process without the settings of the product."""
    return {name: value for name, value in os.environ.items() if name not in known_environment_names()}
