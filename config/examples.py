"""Examples that users add to the prompt: a JSON file, which ``cli.py prompt suggest`` writes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from config.settings import Settings
from config.taxonomy import Example, Taxonomy, load_taxonomy
from error_handler import ConfigurationError


def load_prompt_taxonomy(settings: Settings) -> Taxonomy:
    """Return the taxonomy of *settings* with the examples for the prompt.

    Raises:
        ConfigurationError: One of the files cannot be used; the message names it.
    """
    taxonomy = load_taxonomy(settings.taxonomy_file)
    return replace(taxonomy, examples=load_examples(settings.prompt_examples_file))


def load_examples(path: Path | None) -> tuple[Example, ...]:
    """Return the examples in the file *path*; none if it is None.

    Raises:
        ConfigurationError: The file cannot be read, or is not of this form.
    """
    if path is None:
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["examples"]
        return tuple(_example(entry) for entry in entries)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot read the examples {path} ({exc.strerror}); check PROMPT_EXAMPLES_FILE."
        ) from exc
    except (ValueError, TypeError, LookupError) as exc:
        raise ConfigurationError(
            f"The examples {path} are not of the form that python cli.py prompt suggest --write writes; write them again."
        ) from exc


def examples_json(examples: tuple[Example, ...]) -> str:
    """Return the content of a file for ``load_examples``."""
    entries = [asdict(one) for one in examples]
    return json.dumps({"examples": entries}, indent=2, ensure_ascii=False) + "\n"


def _example(entry: dict[str, object]) -> Example:
    transcript, answer, source = entry["transcript"], entry["answer"], entry["source"]
    if not isinstance(transcript, str) or not isinstance(source, str) or not isinstance(answer, dict):
        raise TypeError("not an example")
    # Files of earlier versions do not have the hash; it is that of the text where nothing was masked.
    known = entry.get("input_sha256") or hashlib.sha256(transcript.encode()).hexdigest()
    return Example(transcript, answer, source, str(known))
