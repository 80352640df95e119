"""Loads a settings class, and names its environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, ValidationError
from pydantic_settings import BaseSettings

from error_handler import ConfigurationError

S = TypeVar("S", bound=BaseSettings)


def env(*names: str) -> Any:
    """Return the alias of a field that the variables *names* set. The first one wins."""
    return AliasChoices(*names)


def variables_of(settings: type[BaseSettings], field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of *settings*, the main one first."""
    alias = settings.model_fields[field].validation_alias
    return tuple(str(name) for name in alias.choices) if isinstance(alias, AliasChoices) else (field.upper(),)


def load_part(settings: type[S], dotenv: Path | None, arguments: Mapping[str, Any]) -> S:
    """Return *settings*. Precedence: *arguments* (field names), environment, *dotenv*, defaults.

    An argument that is None counts as not given. *dotenv* None reads no file. Only ``load_settings``, which every
    command calls as well, refuses unknown names in the file.

    Raises:
        ConfigurationError: A value is wrong. The message names each variable and never shows a value.
    """
    fields = {name: field for field in settings.model_fields for name in (field, *variables_of(settings, field))}
    given = {_key(settings, name): value for name, value in arguments.items() if value is not None}
    try:
        return settings(_env_file=dotenv, **given)
    except ValidationError as exc:
        problems = []
        for error in exc.errors(include_input=False, include_url=False):
            name = variables_of(settings, fields[str(error["loc"][0])])[0]
            problems.append(f"{name}: {error['msg'].removeprefix('Value error, ')}")
        raise ConfigurationError("Wrong setting: " + "; ".join(problems) + ".") from exc


def _key(settings: type[BaseSettings], field: str) -> str:
    """Return the argument of *settings* for *field*: its alias, if it has one."""
    has_alias = settings.model_fields[field].validation_alias is not None
    return variables_of(settings, field)[0] if has_alias else field
