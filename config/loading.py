"""Loads a settings class, and names its environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, AliasChoices, BeforeValidator, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from error_handler import ConfigurationError

DOTENV = Path(".env")
DOTENV_ENCODING = "utf-8-sig"  # Windows editors put a byte order mark first
OWN_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - where a server listens, as a client has to call it
_SHORT_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[A-Za-z0-9._-]*)(:\d+)?(/.*)?")
_OLLAMA_PATH = re.compile(r"(/v1|/api)(/(chat|generate|tags|embed|chat/completions))?/?$")

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
    if parts.hostname in OWN_ADDRESS:
        port = f":{parts.port}" if parts.port else ""
        value = parts._replace(netloc=OWN_ADDRESS[parts.hostname] + port).geturl()
    return value.rstrip("/")


def _complete_ollama_address(value: Any) -> Any:
    """Return *value* as Ollama reads OLLAMA_HOST (scheme, host and port may be missing), without a path of its API."""
    if not isinstance(value, str):
        return value
    is_bare_ipv6 = value.count(":") > 1 and not set("[/") & set(value)
    if short := _SHORT_ADDRESS.fullmatch(f"[{value}]" if is_bare_ipv6 else value):
        host, port, path = short.groups()
        value = f"http://{host or '127.0.0.1'}{port or ':11434'}{path or ''}"
    return _OLLAMA_PATH.sub("", value)


def _ollama_addresses(value: Any) -> Any:
    """Return the addresses in *value*, a list or a text with commas, as ``_ollama_address`` returns each, with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    listed = [one for part in parts for one in str(part).split(",")]
    named = [one.strip() for one in listed if one.strip()] or listed[:1]
    return ",".join(dict.fromkeys(_plain_http_url(_complete_ollama_address(one)) for one in named))


OWN_FORM = NoDecode  # a validator reads the text, which need not be JSON


def _split(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


NameList = Annotated[tuple[str, ...], OWN_FORM, BeforeValidator(_split)]  # names with commas between them


def _expanded(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


# With ~ as in a shell, which does not expand it in a .env or behind a flag's equals sign.
HomePath = Annotated[Path, BeforeValidator(_expanded)]
HomePathText = Annotated[str, BeforeValidator(_expanded)]

# An address without credentials or query, and a secret that is sent in an HTTP header.
HttpAddress = Annotated[str, AfterValidator(_plain_http_url)]
OllamaAddresses = Annotated[str, BeforeValidator(_ollama_addresses)]  # one or more, with commas between them
HeaderSecret = Annotated[SecretStr, shaped("[!-~]*", "must be printable ASCII without spaces and line ends")]


class PartSettings(BaseSettings):
    """The base of all settings classes; load_settings refuses unknown names in .env, because it knows all classes."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, env_file_encoding=DOTENV_ENCODING
    )

    @model_validator(mode="before")
    @classmethod
    def _without_quotes(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Remove the quotes around whole values, which ``docker run --env-file`` and some shells keep."""
        for name, value in values.items():
            if isinstance(value, str) and (quoted := re.fullmatch(r"(?s)(['\"])((?:(?!\1).)+)\1", value)):
                values[name] = quoted[2]
        return values


@contextmanager
def changed_environment(**variables: str) -> Iterator[None]:
    """Set *variables* inside the block, for a library that reads them when it is imported."""
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def variables_of(settings: type[BaseSettings], field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of *settings*, the main one first."""
    alias = settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(name) for name in alias.choices)
    return (str(alias or settings.model_config["env_prefix"] + field.upper()),)


def read_dotenv(dotenv: Path | None) -> dict[str, str | None]:
    """Return the variables of *dotenv*; none if it is None or missing.

    Raises:
        ConfigurationError: The file or one of its lines cannot be read. The message has its number, never its text.
    """
    if dotenv is None or not dotenv.is_file():
        return {}
    try:
        with dotenv.open(encoding=DOTENV_ENCODING) as lines:
            statements = list(parse_stream(lines))
        for statement in statements:
            text = statement.original.string
            if statement.error or (statement.key is not None and statement.value is None):
                number = statement.original.line + text[: len(text) - len(text.lstrip())].count("\n")
                raise ConfigurationError(
                    f"Line {number} of {dotenv} cannot be read; expected NAME=value, and a quote that opens must close."
                )
        return dotenv_values(dotenv, encoding=DOTENV_ENCODING)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"Cannot read {dotenv}; it must be a UTF-8 file that this user may read.") from exc


def load_part(settings: type[S], dotenv: Path | None = DOTENV, **arguments: Any) -> S:
    """Return *settings*. Precedence: *arguments* (field names), environment, *dotenv*, defaults.

    An argument that is None counts as not given. *dotenv* None reads no file. Only ``load_settings``, which every
    command calls as well, refuses unknown names in the file.

    Raises:
        ConfigurationError: A value is wrong, or a line of *dotenv* cannot be read. The message names each variable and
            never shows a value.
    """
    read_dotenv(dotenv)
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
            if error["type"] == "default_factory_not_called":  # it follows from the problem of another setting
                continue
            name = variables_of(settings, fields[str(error["loc"][0])])[0]
            problems.append(f"{name}: {error['msg'].removeprefix('Value error, ')}")
        raise ConfigurationError("Wrong setting: " + "; ".join(problems) + ".") from exc
