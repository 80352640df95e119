"""The taxonomy: the fields of a classification and their allowed labels, read from a YAML file that users can replace."""

from __future__ import annotations

import logging
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from error_handler import ConfigurationError

logger = logging.getLogger(__name__)

DEFAULT_TAXONOMY = Path(__file__).with_name("taxonomy.yaml")

TRIAD = {"intents": "intent", "topics": "topic", "sentiments": "sentiment"}  # a key of the file -> its field
_OTHER_KEYS = ("fields", "categorization")

# A field name is a key in JSON, in MongoDB and in Python, and a heading in the prompt.
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
# The last eight stand beside the labels in the embedding index and its answers.
_TAKEN = frozenset(
    {*TRIAD, *TRIAD.values(), "categorization"}
    | {"source_id", "conversation_number", "classified_at", "classified_by", "kind", "name", "similarity", "text"}
)


@dataclass(frozen=True, slots=True)
class Label:
    """One allowed label, its one-line definition, and the phrases that the built-in baseline searches for."""

    name: str
    definition: str
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation and its right answer, for the prompt.

    *transcript* has masked personal data. *answer* has the keys of a model's answer. *source* is the ``_id`` of the
    conversation as canonical Extended JSON, *input_sha256* its ``transcript_sha256``, empty if it is unknown.
    """

    transcript: str
    answer: dict[str, Any]
    source: str
    input_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a classification and its labels, at least one, in the order of the file.

    The names of labels are unique without regard to case, spacing and Unicode form. *definition* is what the field says
    about a conversation; empty if the file has none. A field that *is_multiple* may have several labels at once.
    """

    name: str
    labels: tuple[Label, ...]
    definition: str = ""
    is_multiple: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return tuple(label.name for label in self.labels)


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """The fields of a classification, at least one, in the order of results.

    *has_categorization* is False if the model writes no one-line summary beside the labels.
    """

    fields: tuple[Field, ...]
    has_categorization: bool = True
    examples: tuple[Example, ...] = ()  # in addition to those of prompt_builder

    @property
    def field_names(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(field.name for field in self.fields)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a model's answer: the categorization first, if there is one, then the fields."""
        return ("categorization", *self.field_names) if self.has_categorization else self.field_names

    def is_example(self, source: str, input_sha256: str) -> bool:
        """Return whether the conversation *source*, or one with its text, is an example: it is never gold for this prompt."""
        return any(one.source == source or one.input_sha256 == input_sha256 != "" for one in self.examples)

    def field(self, name: str) -> Field:
        """Return the field *name*, one of ``field_names``."""
        return next(field for field in self.fields if field.name == name)

    def labels(self, field: str) -> tuple[Label, ...]:
        """Return the labels of *field*, one of ``field_names``, in the order of the file."""
        return self.field(field).labels

    def names(self, field: str) -> tuple[str, ...]:
        """Return the names of the labels of *field*."""
        return self.field(field).names


def fold_label(text: str) -> str:
    """Return the form of *text* for comparing labels: NFC, case-folded and without spaces."""
    folded = unicodedata.normalize("NFC", "".join(text.split())).casefold()
    return unicodedata.normalize("NFC", folded)  # folding takes some letters apart


class _TaxonomyLoader(yaml.CSafeLoader):
    """Reads Yes, No, On and Off as texts: YAML would make true and false of the labels. A repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:  # PyYAML would keep the last one
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


_TaxonomyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def load_taxonomy(path: Path | None = None) -> Taxonomy:
    """Read the taxonomy from *path*; None means the shipped file.

    Raises:
        ConfigurationError: The file is missing, not YAML, or not a taxonomy. The message names the file and the entry.
    """
    path = path or DEFAULT_TAXONOMY
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"Cannot read the taxonomy {path} ({exc.strerror}); check TAXONOMY_FILE.") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f" (line {mark.line + 1}: {getattr(exc, 'problem', '')})" if mark else ""
        raise ConfigurationError(
            f"The taxonomy {path} is not valid YAML{place}; compare it with config/taxonomy.yaml."
        ) from exc
    return _taxonomy(path, content if isinstance(content, dict) else {})


@lru_cache(maxsize=4)  # parsing takes 10 ms
def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_TaxonomyLoader)  # noqa: S506 - the loader is a safe one


def _taxonomy(path: Path, content: dict[Any, Any]) -> Taxonomy:
    if unknown := [key for key in content if key not in (*TRIAD, *_OTHER_KEYS)]:
        raise ConfigurationError(
            f"The taxonomy {path} has the unknown key {unknown[0]}; its keys are {', '.join((*TRIAD, *_OTHER_KEYS))}."
        )
    missing = [key for key in TRIAD if key not in content]
    if missing and "fields" not in content:
        raise ConfigurationError(
            f"The taxonomy {path} lacks {' and '.join(missing)}; only a file with fields may leave out intents, topics "
            "or sentiments."
        )
    triad = tuple(Field(name, _labels(path, key, content[key])) for key, name in TRIAD.items() if key in content)
    more = _fields(path, content["fields"]) if "fields" in content else ()
    has_categorization = _switch(path, "categorization", content.get("categorization", "true"))
    return Taxonomy((*triad, *more), has_categorization)


def _fields(path: Path, given: Any) -> tuple[Field, ...]:
    if not isinstance(given, dict) or not given:
        raise ConfigurationError(f"In the taxonomy {path}, fields must map each field to its labels.")
    return tuple(_field(path, name, entry, list(given)) for name, entry in given.items())


def _field(path: Path, name: Any, entry: Any, all_names: list[Any]) -> Field:
    place = f"fields > {name}"
    if not isinstance(name, str) or not _FIELD_NAME.fullmatch(name):
        raise ConfigurationError(
            f"In the taxonomy {path}, {place} is not a field name: it needs a letter, then at most 39 letters, digits "
            "or underscores."
        )
    if name.casefold() in _TAKEN or sum(name.casefold() == str(other).casefold() for other in all_names) > 1:
        raise ConfigurationError(f"In the taxonomy {path}, {place} has a name that is taken; choose another name.")
    entry = {"labels": entry} if isinstance(entry, list) else entry
    if not isinstance(entry, dict) or not {"labels"} <= entry.keys() <= {"definition", "labels", "multiple"}:
        raise ConfigurationError(
            f"In the taxonomy {path}, {place} must be a list of labels, or have the key labels and, if you like, "
            "definition and multiple."
        )
    definition = entry.get("definition", "")
    if not isinstance(definition, str):
        raise ConfigurationError(f"In the taxonomy {path}, {place} > definition must be one line of text.")
    labels = _labels(path, f"{place} > labels", entry["labels"])
    is_multiple = _switch(path, f"{place} > multiple", entry.get("multiple", "false"))
    return Field(name, labels, " ".join(definition.split()), is_multiple)


def _switch(path: Path, place: str, value: Any) -> bool:
    switch = {"true": True, "false": False}.get(str(value).casefold())
    if switch is None:
        raise ConfigurationError(f"In the taxonomy {path}, {place} must be true or false.")
    return switch


def _labels(path: Path, place: str, entries: Any) -> tuple[Label, ...]:
    """Return the labels of a mapping to definitions or, except for intents and topics, of a list of names."""
    if isinstance(entries, list) and place not in ("intents", "topics"):
        if not all(isinstance(name, str) for name in entries):
            raise ConfigurationError(
                f"In the taxonomy {path}, {place} must be a list of names; put numbers and dates in quotes."
            )
        _require_distinct(path, place, entries)
        return tuple(Label(name, "") for name in entries)
    if not isinstance(entries, dict) or not entries:
        what = "map each label to its definition" if place in ("intents", "topics") else "be a list of names"
        raise ConfigurationError(f"In the taxonomy {path}, {place} must {what}.")
    _require_distinct(path, place, list(entries))
    return tuple(_label(path, place, name, given) for name, given in entries.items())


def _label(path: Path, place: str, name: Any, given: Any) -> Label:
    if not isinstance(name, str):  # 404 or a date without quotes
        raise ConfigurationError(f"In the taxonomy {path}, {place} > {name} is not a string in YAML; put it in quotes.")
    entry = {"definition": given} if isinstance(given, str) else given
    if not isinstance(entry, dict) or not isinstance(entry.get("definition"), str):
        raise ConfigurationError(f"In the taxonomy {path}, {place} > {name} needs a one-line definition.")
    for key in sorted(map(str, entry.keys() - {"definition", "phrases"})):
        _warn(
            f"In the taxonomy {path}, {place} > {name} has the unknown key {key}, which is ignored; use definition or phrases."
        )
    phrases = entry.get("phrases") or []
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise ConfigurationError(f"In the taxonomy {path}, {place} > {name} > phrases must be a list of texts.")
    return Label(name, " ".join(entry["definition"].split()), tuple(phrases))


@lru_cache(maxsize=1024)  # a command reads the file several times
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


def _require_distinct(path: Path, place: str, names: list[Any]) -> None:
    folded = [fold_label(str(name)) for name in names]
    if not names or len(set(folded)) != len(names) or "" in folded:
        raise ConfigurationError(f"In the taxonomy {path}, {place} must hold distinct, non-empty labels.")
