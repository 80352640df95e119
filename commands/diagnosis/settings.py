"""Checks of the settings, with their origins, and of the labels. Secrets are masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from commands.diagnosis.findings import Finding, error, ok, warning
from config import Settings, load_taxonomy
from config.masked_settings import shown
from config.settings import DOTENV, environment_names
from config.settings_origins import Origin, settings_origins
from error_handler import ConfigurationError


def diagnose_settings(settings: Settings, flags: Mapping[str, str], dotenv: Path | None = DOTENV) -> Iterator[Finding]:
    """Yield one finding for each setting; *flags* maps the fields that were set by flags to the flags."""
    for field, origin in settings_origins(flags, dotenv).items():
        value = shown(field, getattr(settings, field))
        name = environment_names(field)[0]
        numbers = {
            "setting": field,
            "variable": name,
            "value": value,
            "origin": origin.kind,
            "origin_name": origin.name,
        }
        surplus = _other_name(origin)
        if surplus:
            sentence = f"{name} = {value} ({_words(origin, dotenv)}): both names of this setting are set."
            yield Finding("warning", sentence, f"Remove {surplus}.", numbers)
        else:
            yield Finding("ok", f"{name} = {value} ({_words(origin, dotenv)})", numbers=numbers)
    if dotenv is not None and dotenv.is_file() and dotenv.stat().st_mode & 0o077:
        yield warning(f"Other users of this machine can read {dotenv}.", f"chmod 600 {dotenv}")


def diagnose_labels(settings: Settings) -> Iterator[Finding]:
    """Yield whether the taxonomy loads, and whether it has the fallback label of the prompt."""
    try:
        taxonomy = load_taxonomy(settings.taxonomy_file)
    except ConfigurationError as exc:
        yield error(str(exc), "Fix the file, or unset TAXONOMY_FILE to use the shipped labels.")
        return
    fields = ("intent", "topic", "sentiment")
    numbers = {field: len(taxonomy.names(field)) for field in fields}
    counts = ", ".join(f"{count} {field}s" for field, count in numbers.items())
    yield ok(f"The labels load: {counts}.", **numbers)
    lacking = [field for field in ("intent", "topic") if "Other" not in taxonomy.names(field)]
    if lacking:
        sentence = f"There is no label Other for {' and '.join(lacking)}; the prompt names it for anything else."
        yield warning(sentence, "Add Other to the taxonomy; without it the model has to choose a wrong label.")


def _other_name(origin: Origin) -> str | None:
    """Return a second name of the setting that is set as well, or None.

    One name set in two places is an override; two names are a mistake.
    """
    names = [name for kind, name in ((origin.kind, origin.name), *origin.overruled) if kind != "argument"]
    return next((name for name in names if name != names[0]), None)


def _words(origin: Origin, dotenv: Path | None) -> str:
    place = {
        "argument": f"flag {origin.name}",
        "environment": f"environment variable {origin.name}",
        "dotenv": f"{origin.name} in {dotenv}",
        "default": "default",
    }[origin.kind]
    overruled = {kind: name for kind, name in reversed(origin.overruled)}
    if not overruled:
        return place
    also = " and ".join(
        f"{name} in {dotenv}" if kind == "dotenv" else f"environment variable {name}"
        for kind, name in overruled.items()
    )
    return f"{place}, overrides {also}"
