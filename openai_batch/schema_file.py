"""A schema file: Python of the operator's own that builds the parts of a job."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from error_handler import JobValidationError
from openai_batch.job_config import (
    BatchConfig,
    DatabaseConfig,
    DocumentFields,
    NotificationConfig,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
)
from openai_batch.user_functions import FUNCTION_ERRORS, require_private

# The type of a part tells what it is for, whatever the file calls it.
_PARTS: dict[type[BaseModel], str] = {
    SchemaConfig: "schema_config",
    DocumentFields: "fields",
    PromptConfig: "prompts",
    DatabaseConfig: "database",
    OpenAIConfig: "openai",
    BatchConfig: "batch",
    NotificationConfig: "notifications",
}


@dataclass(frozen=True, slots=True)
class SchemaFile:
    """What a schema file gives: *parts* by their names in AppConfig, and what handles its answers.

    *results_of_conversations* says that the job labels conversations: its answers go to the results collection.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    response_processor: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    results_of_conversations: bool = False


def load_schema_file(path: Path) -> SchemaFile:
    """Run the file at *path* and return what it defines; it is code and is trusted like this program.

    Raises:
        JobValidationError: It is not there, does not run, or defines no SchemaConfig, or two parts of one kind.
    """
    if not path.is_file():
        raise JobValidationError(f"there is no schema file {path}; schema_examples/ has some to start from.")
    require_private(path)
    try:
        names = runpy.run_path(str(path), run_name="schema_file")
    except ValidationError as exc:
        raise JobValidationError(f"{path}: {explain(exc)}") from exc
    except SyntaxError as exc:
        raise JobValidationError(f"{path}, line {exc.lineno}: this is no Python.") from exc
    except (ImportError, OSError, *FUNCTION_ERRORS) as exc:
        raise JobValidationError(f"{path} cannot be run ({type(exc).__name__}: {exc})") from exc
    parts: dict[str, Any] = {}
    for name, value in names.items():
        kind = _PARTS.get(type(value))
        if kind is None or name.startswith("_"):
            continue
        if kind in parts and parts[kind] is not value:
            raise JobValidationError(f"{path} defines two of {type(value).__name__}; a job has one.")
        parts[kind] = value
    if "schema_config" not in parts:
        raise JobValidationError(f"{path} defines no SchemaConfig; schema_examples/ shows one.")
    processor = names.get("response_processor")
    if processor is not None and not callable(processor):
        raise JobValidationError(f"{path}: response_processor must be a function (response, document) -> dict.")
    return SchemaFile(parts, processor, names.get("results_of_conversations") is True)


def explain(exc: ValidationError) -> str:
    """Return the first three problems as one sentence, without the values."""
    errors = exc.errors(include_input=False, include_url=False, include_context=False)[:3]
    texts = (e["msg"].removeprefix("Value error, ") for e in errors)
    places = (".".join(str(part) for part in e["loc"]) for e in errors)
    return "; ".join(f"{place}: {text}" if place else text for place, text in zip(places, texts, strict=True)) + "."
