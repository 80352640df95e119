"""The taxonomy: the allowed labels, read from a YAML file that users can replace."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from error_handler import ConfigurationError

DEFAULT_TAXONOMY = Path(__file__).with_name("taxonomy.yaml")


@dataclass(frozen=True, slots=True)
class Label:
    """One allowed label, its one-line definition, and the phrases that the built-in baseline searches for."""

    name: str
    definition: str
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """The allowed labels, in the order of the file.

    Each group has at least one label. Names are unique without regard to case, spacing and Unicode form.
    """

    intents: tuple[Label, ...]
    topics: tuple[Label, ...]
    sentiments: tuple[str, ...]
    examples: tuple[Example, ...] = ()  # in addition to those of prompt_builder

    @property
    def field_names(self) -> tuple[str, ...]:
        """The fields of a classification that have a closed list of labels, in the order of results."""
        return ("intent", "topic", "sentiment")

    def labels(self, field: str) -> tuple[Label, ...]:
        """Return the labels of *field*, one of ``field_names``, in the order of the file."""
        if field == "sentiment":
            return tuple(Label(name, "") for name in self.sentiments)
        return self.intents if field == "intent" else self.topics

    def names(self, field: str) -> tuple[str, ...]:
        """Return the names of the labels of *field*."""
        return tuple(label.name for label in self.labels(field))


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation and its right answer, for the prompt.

    *transcript* has masked personal data. *answer* has the keys of a model's answer. *source* is the ``_id`` of the
    conversation as canonical Extended JSON: it is never gold for this prompt.
    """

    transcript: str
    answer: dict[str, Any]
    source: str


def fold_label(text: str) -> str:
    """Return the form of *text* for comparing labels: NFC, case-folded and without spaces."""
    folded = unicodedata.normalize("NFC", "".join(text.split())).casefold()
    return unicodedata.normalize("NFC", folded)  # folding takes some letters apart


def load_taxonomy(path: Path | None = None) -> Taxonomy:
    """Read the taxonomy from *path*; None means the shipped file.

    Raises:
        ConfigurationError: The file is missing, not YAML, or not a taxonomy. The message names the file and the entry.
    """
    path = path or DEFAULT_TAXONOMY
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except OSError as exc:
        raise ConfigurationError(f"Cannot read the taxonomy {path} ({exc.strerror}); check TAXONOMY_FILE.") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigurationError(
            f"The taxonomy {path} is not valid YAML; compare it with config/taxonomy.yaml."
        ) from exc
    if not isinstance(content, dict) or set(content) != {"intents", "topics", "sentiments"}:
        raise ConfigurationError(f"The taxonomy {path} needs exactly the keys intents, topics and sentiments.")
    sentiments = content["sentiments"]
    if not isinstance(sentiments, list) or not all(isinstance(name, str) and name.strip() for name in sentiments):
        raise ConfigurationError(f"In the taxonomy {path}, sentiments must be a list of names.")
    _require_distinct(path, "sentiments", sentiments)
    return Taxonomy(
        intents=_labels(path, "intents", content["intents"]),
        topics=_labels(path, "topics", content["topics"]),
        sentiments=tuple(sentiments),
    )


def _labels(path: Path, group: str, entries: Any) -> tuple[Label, ...]:
    if not isinstance(entries, dict) or not entries:
        raise ConfigurationError(f"In the taxonomy {path}, {group} must map each label to its definition.")
    _require_distinct(path, group, list(entries))
    labels = []
    for name, given in entries.items():
        if not isinstance(name, str):  # Yes or 404 without quotes
            raise ConfigurationError(
                f"In the taxonomy {path}, {group} > {name} is not a string in YAML; put it in quotes."
            )
        entry = {"definition": given} if isinstance(given, str) else given
        if not isinstance(entry, dict) or not isinstance(entry.get("definition"), str):
            raise ConfigurationError(f"In the taxonomy {path}, {group} > {name} needs a one-line definition.")
        phrases = entry.get("phrases") or []
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise ConfigurationError(f"In the taxonomy {path}, {group} > {name} > phrases must be a list of texts.")
        labels.append(Label(name, " ".join(entry["definition"].split()), tuple(phrases)))
    return tuple(labels)


def _require_distinct(path: Path, group: str, names: list[Any]) -> None:
    folded = [fold_label(str(name)) for name in names]
    if not names or len(set(folded)) != len(names) or "" in folded:
        raise ConfigurationError(f"In the taxonomy {path}, {group} must hold distinct, non-empty labels.")
