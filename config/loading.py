"""What the classes of settings have in common: their variables, and what becomes of a malformed one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, ValidationError
from pydantic_settings import BaseSettings

from error_handler import ConfigurationError

S = TypeVar("S", bound=BaseSettings)


def env(*names: str) -> Any:
    """Return the alias of a field that the variables *names* set, the main one first."""
    return AliasChoices(*names)


def variables_of(settings: type[BaseSettings], field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of *settings*, the main one first."""
    alias = settings.model_fields[field].validation_alias
    return tuple(str(name) for name in alias.choices) if isinstance(alias, AliasChoices) else ()


def load_part(settings: type[S], dotenv: Path | None, arguments: Mapping[str, Any]) -> S:
    """Return *settings*; *arguments* (field names) win over the environment, that over *dotenv*.

    An argument that is None counts as not given; *dotenv* None reads no file. Unknown names in the
    file are the business of ``load_settings``, which every command calls as well.

    Raises:
        ConfigurationError: A value is malformed. The message names each one and never shows a secret.
    """
    # By the names of the environment: if fields had a second name, any variable of that name would count.
    given = {variables_of(settings, name)[0]: value for name, value in arguments.items() if value is not None}
    try:
        return settings(_env_file=dotenv, **given)
    except ValidationError as exc:
        errors = exc.errors(include_input=False, include_url=False)
        problems = [f"{error['loc'][0]}: {error['msg'].removeprefix('Value error, ')}" for error in errors]
        raise ConfigurationError("Wrong setting: " + "; ".join(problems) + ".") from exc
