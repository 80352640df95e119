"""Schema files: the operator's own Python that builds the parts of a job, and the functions that it names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import runpy
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from error_handler import JobValidationError
from openai_batch.job_config import PARTS, Document

ResponseProcessor = Callable[[Any, Document], Mapping[str, Any]]

# No name may begin with an underscore: such names lead to the internals of Python.
_FUNCTION = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*:[A-Za-z]\w*", re.ASCII)

# Exceptions that users' functions may raise; any other exception ends their process. MemoryError is handled there.
USER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class SchemaFile:
    """The content of a schema file: *parts* by their names in AppConfig, and the response processor.

    *results_of_conversations*: the job labels conversations and writes to the worker's results collection.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    response_processor: ResponseProcessor | None = None
    results_of_conversations: bool = False


def load_schema_file(path: Path) -> SchemaFile:
    """Run the file at *path* and return what it defines; it is code, trusted like this program.

    Raises JobValidationError if it does not exist or run, or has no SchemaConfig or two parts of one type.
    """
    if not path.is_file():
        raise JobValidationError(f"there is no schema file {path}; schema_examples/ has some to start from.")
    require_private(path)
    try:
        names = runpy.run_path(str(path), run_name="schema_file")
    except ValidationError as exc:
        raise JobValidationError(f"{path}: {explain(exc)}") from exc
    except SyntaxError as exc:
        raise JobValidationError(f"{path}, line {exc.lineno}: not valid Python.") from exc
    except (ImportError, OSError, *USER_ERRORS) as exc:
        raise JobValidationError(f"{path} cannot be run ({type(exc).__name__}: {exc})") from exc
    parts: dict[str, Any] = {}
    for name, value in names.items():
        kind = PARTS.get(type(value))  # parts are recognised by type; their names do not matter
        if kind is not None and not name.startswith("_") and parts.setdefault(kind, value) is not value:
            raise JobValidationError(f"{path} defines two objects of type {type(value).__name__}; keep one.")
    if "schema_config" not in parts:
        raise JobValidationError(f"{path} defines no SchemaConfig; schema_examples/ shows one.")
    processor = names.get("response_processor")
    if processor is not None and not callable(processor):
        raise JobValidationError(f"{path}: response_processor must be a function (response, document) -> dict.")
    return SchemaFile(parts, processor, names.get("results_of_conversations") is True)


def explain(exc: ValidationError) -> str:
    """Return the first three problems as one sentence, without values."""
    errors = exc.errors(include_input=False, include_url=False, include_context=False)[:3]
    texts = (e["msg"].removeprefix("Value error, ") for e in errors)
    places = (".".join(str(part) for part in e["loc"]) for e in errors)
    return "; ".join(f"{place}: {text}" if place else text for place, text in zip(places, texts, strict=True)) + "."


def resolve_function(given: Callable[[Any], Any] | str, field: str) -> Callable[[Any], Any]:
    """Return the function that a schema gives, or names as ``module:function``.

    Raises JobValidationError if it is not a function of one value in a module of the operator that only they can
    write. Functions of Python itself are refused, also under another module's name: ``os:system`` and
    ``builtins:eval`` would run data as commands and code.
    """
    if callable(given):
        return given
    module_name, _, name = given.partition(":")
    if not _FUNCTION.fullmatch(given) or _is_of_python(module_name):
        raise JobValidationError(f"preprocess function of {field}: must be module:function of a module of your own.")
    try:
        spec = importlib.util.find_spec(module_name)
        if spec is not None and spec.origin is not None:
            require_private(Path(spec.origin))
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, *USER_ERRORS, SyntaxError, OSError) as exc:
        raise JobValidationError(
            f"preprocess function of {field}: {given} cannot be imported ({type(exc).__name__})."
        ) from exc
    if not inspect.isroutine(function) or _is_of_python(str(getattr(function, "__module__", None) or "builtins")):
        raise JobValidationError(f"preprocess function of {field}: {given} is not a function of your own.")
    try:
        inspect.signature(function).bind(None)
    except TypeError as exc:
        raise JobValidationError(f"preprocess function of {field}: {given} must take one value.") from exc
    return function


def _is_of_python(module_name: str) -> bool:
    return module_name.partition(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names, "builtins"}


def require_private(path: Path) -> None:
    """Raise JobValidationError if every user of the machine can change the code in *path*."""
    for place in (path, path.parent):
        if place.exists():
            mode = place.stat().st_mode
            # In a sticky directory such as /tmp users cannot replace each other's files.
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise JobValidationError(f"{place} can be changed by everybody; run chmod o-w {place}.")
