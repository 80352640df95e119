"""Checks of the settings, with their origins, and of the labels. Secrets are masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from commands.diagnosis.findings import Finding, error, ok, warning
from config import Settings, load_prompt_taxonomy
from config.loading import DOTENV, variables_of
from config.settings import DEFAULT_DATABASE, OriginKind, settings_origins
from config.taxonomy import TRIAD
from domain.text import counted
from error_handler import ConfigurationError
from storage.mongo_connection import MASK, hosts_of


def diagnose_settings(settings: Settings, flags: Mapping[str, str], dotenv: Path | None = DOTENV) -> Iterator[Finding]:
    """Yield one finding for each setting; *flags* maps the fields that were set by flags to the flags."""
    origins = settings_origins(flags, dotenv)
    if not origins["db_name"] and settings.db_name != DEFAULT_DATABASE:
        origins["db_name"] = origins["mongodb_uri"][:1]
    for field, places in origins.items():
        value, name = shown(field, getattr(settings, field)), variables_of(Settings, field)[0]
        kind, origin = places[0] if places else ("default", None)
        numbers = {"setting": field, "variable": name, "value": value, "origin": kind, "origin_name": origin}
        sentence = f"{name} = {value} ({_words(places, dotenv)})"
        # One name set in two places is an override; two names are a mistake, unless one is that of the Ollama server.
        variables = [place for kind, place in places if kind != "argument" and place.upper() != "OLLAMA_HOST"]
        surplus = [other for other in variables if other != variables[0]]
        if surplus:
            yield warning(f"{sentence}: both names of this setting are set.", f"Remove {surplus[0]}.", **numbers)
        else:
            yield ok(sentence, **numbers)
    if dotenv is not None and dotenv.is_file() and dotenv.stat().st_mode & 0o077:
        yield warning(f"Other users of this machine can read {dotenv}.", f"chmod 600 {dotenv}")


def diagnose_labels(settings: Settings) -> Iterator[Finding]:
    """Yield whether the taxonomy loads, and whether it has the fallback label of the prompt."""
    try:
        taxonomy = load_prompt_taxonomy(settings)
    except ConfigurationError as exc:
        yield error(str(exc), "Fix the file, or unset TAXONOMY_FILE to use the shipped labels.")
        return
    numbers = {field: len(taxonomy.names(field)) for field in taxonomy.field_names}
    counts = [
        f"{count} {field}s" if field in TRIAD.values() else f"{counted(count, 'label')} of {field}"
        for field, count in numbers.items()
    ]
    yield ok(f"The labels load: {', '.join(counts)}.", **numbers)
    lacking = [field for field in ("intent", "topic") if field in numbers and "Other" not in taxonomy.names(field)]
    if lacking:
        sentence = f"There is no label Other for {' and '.join(lacking)}; the prompt names it for anything else."
        yield warning(sentence, "Add Other to the taxonomy; without it the model has to choose a wrong label.")


def _words(places: Sequence[tuple[OriginKind, str]], dotenv: Path | None) -> str:
    """Return the place that sets a value, and the places that it overrides, one of each kind."""
    if not places:
        return "default"
    words = {"argument": "flag {0}", "environment": "environment variable {0}", "dotenv": "{0} in {1}"}
    overrides = {kind: name for kind, name in reversed(places[1:])}
    texts = [words[kind].format(name, dotenv) for kind, name in (places[0], *overrides.items())]
    return f"{texts[0]}, overrides {' and '.join(texts[1:])}" if overrides else texts[0]


def shown(field: str, value: Any) -> str:
    """Return the text for the setting *field*, with secrets and the options of a MongoDB address masked."""
    if value is None:
        return "not set"
    if not isinstance(value, SecretStr):
        return str(value)
    if field != "mongodb_uri":
        return MASK
    uri = value.get_secret_value()
    user = f"{MASK}@" if "@" in uri else ""
    options = f"/?{MASK}" if "?" in uri else ""
    return f"{uri.partition('://')[0]}://{user}{hosts_of(uri)}{options}"
