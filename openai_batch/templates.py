"""Jinja2 prompts, and response templates in which the model's text is only a value. Pure; the owner of jinja2.

Prompts run in an immutable sandbox with strict undefined names, without the globals that lead out of it
(``cycler.__init__.__globals__``), and with size limits. A sandbox bounds neither time nor memory:
``{{ 'x' * 10 ** 9 }}`` passes it. ``render_process.py`` does that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from error_handler import JobProcessingError, JobTemplateError

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_PROMPT_CHARACTERS = 2_000_000

_WORD = re.compile(r"\w+")

CONTENT, DATE, BATCH = "{{response_content}}", "{{current_date}}", "{{batch_id}}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.globals.clear()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False, default=str)
    return environment


class PromptTemplate:
    """One template, parsed once; errors call it *name*."""

    def __init__(self, name: str, source: str) -> None:
        """Parse *source*; raise JobTemplateError if it is too long or malformed."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise JobTemplateError(f"{name} has more than {MAX_TEMPLATE_CHARACTERS} characters; shorten it.")
        self._name = name
        self._words = frozenset(_WORD.findall(source))
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as exc:
            raise JobTemplateError(f"{name}, line {exc.lineno}: not a valid template ({exc.message})") from exc
        except (TemplateError, MemoryError, OverflowError, RecursionError) as exc:
            raise JobTemplateError(f"{name} cannot be used as a template ({type(exc).__name__})") from exc

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the rendered text; values are inserted as they are, never as templates.

        Raises JobProcessingError if a variable is missing, or the template fails for this document.
        """
        try:
            text = self._template.render(variables)
        except UndefinedError as exc:
            raise JobProcessingError(
                f"{self._name} uses an undefined name: {self._name_in(exc)}", is_final=True
            ) from exc
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, MemoryError, RecursionError) as exc:
            raise JobProcessingError(f"{self._name} cannot be rendered ({type(exc).__name__})", is_final=True) from exc
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise JobProcessingError(
                f"{self._name} renders more than {MAX_PROMPT_CHARACTERS} characters", is_final=True
            )
        return text

    def _name_in(self, exc: UndefinedError) -> str:
        """Return the undefined name in Jinja's message, and nothing else of it: it may quote a value."""
        parts = (exc.message or "").split("'")
        # A name that the template does not contain was computed, perhaps from a value.
        return next((part for part in parts if part.isidentifier() and part in self._words), "an attribute")


def fill(template: Any, content: Any, now: datetime, batch_id: str) -> Any:
    """Return the update *template* with the three placeholders filled in.

    A text that consists of one placeholder becomes the value itself, with its type; inside a longer text the value is
    inserted as text. Keys are never changed.
    """
    if isinstance(template, Mapping):
        return {key: fill(value, content, now, batch_id) for key, value in template.items()}
    if isinstance(template, list | tuple):
        return [fill(value, content, now, batch_id) for value in template]
    if not isinstance(template, str):
        return template
    values = {CONTENT: content, DATE: now, BATCH: batch_id}
    compact = template.replace(" ", "")
    if compact in values:
        return values[compact]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    # The content last, so that placeholders in the model's text stay text.
    for placeholder, value in ((DATE, now.isoformat()), (BATCH, batch_id), (CONTENT, text)):
        template = template.replace(placeholder, value)
    return template
