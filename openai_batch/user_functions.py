"""Functions that a schema names or brings: which may be called, and what they may raise."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from error_handler import JobValidationError

# Of one's own: no part of the path begins with an underscore, which leads to what Python is made of.
_FUNCTION = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*:[A-Za-z]\w*", re.ASCII)

# What functions of users raise; whatever is not here ends their process, and that document. Memory is counted there.
FUNCTION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def resolve_function(given: Callable[[Any], Any] | str, field: str) -> Callable[[Any], Any]:
    """Return the function that a schema names as ``module:function``, or gives as it is.

    Functions of the language itself are refused, also under another module's name: ``os:system`` runs commands, ``builtins:eval``
    code, and data is their argument.

    Raises:
        JobValidationError: It is no function of one value, in a module of the operator's own that only they can write.
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
    except (ImportError, AttributeError, *FUNCTION_ERRORS, SyntaxError, OSError) as exc:
        raise JobValidationError(
            f"preprocess function of {field}: {given} cannot be imported ({type(exc).__name__})."
        ) from exc
    if not inspect.isroutine(function) or _is_of_python(str(getattr(function, "__module__", None) or "builtins")):
        raise JobValidationError(f"preprocess function of {field}: {given} is no function of your own.")
    try:
        inspect.signature(function).bind(None)
    except TypeError as exc:
        raise JobValidationError(f"preprocess function of {field}: {given} must take one value.") from exc
    return function


def _is_of_python(module_name: str) -> bool:
    return module_name.partition(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names, "builtins"}


def require_private(path: Path) -> None:
    """Raise JobValidationError where everybody may change the code in *path*."""
    for place in (path, path.parent):
        if place.exists():
            mode = place.stat().st_mode
            # In a sticky directory such as /tmp nobody replaces the files of others.
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise JobValidationError(f"{place} can be changed by everybody; chmod o-w it.")
