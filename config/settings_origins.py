"""Finds the origin of each setting: a flag, the environment, ``.env``, or the default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values

from config.settings import DOTENV, Settings, environment_names
from error_handler import ConfigurationError

OriginKind = Literal["argument", "environment", "dotenv", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a setting: *name* is the flag or variable, None for a default.

    *overruled* lists the other places that set it, highest precedence first: (kind, name).
    """

    kind: OriginKind
    name: str | None = None
    overruled: tuple[tuple[OriginKind, str], ...] = ()


def settings_origins(arguments: Mapping[str, str], dotenv: Path | None = DOTENV) -> dict[str, Origin]:
    """Return the origin of each field of Settings, by the rules of ``load_settings``.

    *arguments* maps each given field to its flag. As in pydantic-settings, empty variables count as not set, the first
    name of a setting wins over its other names, and names are compared without regard to case.

    Raises:
        ConfigurationError: *dotenv* cannot be read.
    """
    environment = {name.lower() for name, value in os.environ.items() if value}
    file = _names_in(dotenv) if dotenv is not None and dotenv.is_file() else set()
    origins = {}
    for field in Settings.model_fields:
        names = environment_names(field)
        found: list[tuple[OriginKind, str]] = [("argument", arguments[field])] if field in arguments else []
        found += [("environment", name) for name in names if name.lower() in environment]
        found += [("dotenv", name) for name in names if name.lower() in file]
        origins[field] = Origin(*found[0], tuple(found[1:])) if found else Origin("default")
    return origins


def _names_in(dotenv: Path) -> set[str]:
    try:
        return {name.lower() for name, value in dotenv_values(dotenv).items() if value}
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"Cannot read {dotenv}; it must be a UTF-8 file that this user may read.") from exc
