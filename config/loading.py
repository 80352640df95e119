"""Loads a settings class, and names its environment variables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from error_handler import ConfigurationError

DOTENV = Path(".env")

S = TypeVar("S", bound="BaseSettings")


def shaped(pattern: str, form: str) -> AfterValidator:
    """Return a validator of texts and secrets that must match *pattern* completely; *form* is the error message."""

    def check(value: Any) -> Any:
        if not re.fullmatch(pattern, value.get_secret_value() if isinstance(value, SecretStr) else value):
            raise ValueError(form)
        return value

    return AfterValidator(check)


def _plain_http_url(value: str) -> str:
    form = "must be http(s)://host[:port][/path], without user name, password or query"
    try:
        parts = urlsplit(value)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as exc:  # its message quotes the address
        raise ValueError(form) from exc
    if not is_usable or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(form)
    return value.rstrip("/")


# An address without credentials or query, and a secret that is sent in an HTTP header.
HttpAddress = Annotated[str, AfterValidator(_plain_http_url)]
HeaderSecret = Annotated[SecretStr, shaped("[!-~]*", "must be printable ASCII without spaces and line ends")]

# load_settings refuses unknown names in .env, because it knows those of all settings classes.
SETTINGS_CONFIG = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)


def variables_of(settings: type[BaseSettings], field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of *settings*, the main one first."""
    alias = settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(name) for name in alias.choices)
    return (str(alias or settings.model_config["env_prefix"] + field.upper()),)


def load_part(settings: type[S], dotenv: Path | None = DOTENV, **arguments: Any) -> S:
    """Return *settings*. Precedence: *arguments* (field names), environment, *dotenv*, defaults.

    An argument that is None counts as not given. *dotenv* None reads no file. Only ``load_settings``, which every
    command calls as well, refuses unknown names in the file.

    Raises:
        ConfigurationError: A value is wrong. The message names each variable and never shows a value.
    """
    fields = {name: field for field in settings.model_fields for name in (field, *variables_of(settings, field))}
    given = {}
    for field, value in arguments.items():
        if value is not None:
            has_alias = settings.model_fields[field].validation_alias is not None
            given[variables_of(settings, field)[0] if has_alias else field] = value
    try:
        return settings(_env_file=dotenv, **given)
    except ValidationError as exc:
        problems = []
        for error in exc.errors(include_input=False, include_url=False):
            name = variables_of(settings, fields[str(error["loc"][0])])[0]
            problems.append(f"{name}: {error['msg'].removeprefix('Value error, ')}")
        raise ConfigurationError("Wrong setting: " + "; ".join(problems) + ".") from exc
