"""From a document to the body of its request, and from an answer to the update of its document.

The owner of jinja2. Prompts run in an immutable sandbox with strict undefined names, without the globals that lead out
of it (``cycler.__init__.__globals__``), and with size limits. A sandbox bounds neither time nor memory:
``{{ 'x' * 10 ** 9 }}`` passes it. ``render_process.py`` does that. In response templates the model's text is only a
value.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from error_handler import JobProcessingError, JobTemplateError, UnreadableDocumentError
from openai_batch.job_config import MISSING, AppConfig, Document, Messages, OpenAIConfig, SchemaConfig, value_at
from openai_batch.job_store import Answer, Handling
from openai_batch.render_process import RenderProcess
from openai_batch.schema_file import USER_ERRORS, ResponseProcessor, resolve_function
from storage.extended_json import bson_encode, canonical, id_text, plain
from storage.selection import UNREADABLE

if TYPE_CHECKING:
    from openai_batch.masking import Mask, Masking

# The functions of the child process, by the names that errors use.
PROMPT, PROCESSOR = "the prompt", "the response processor"

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_PROMPT_CHARACTERS = 2_000_000

_WORD = re.compile(r"\w+")
# OpenAI's o series, GPT-5 and later, and models tuned from them. Other servers know the older name of the limit only.
_CURRENT = re.compile(r"(ft:)?(openai/)?(o\d|gpt-([5-9]|\d\d))")

_PLACEHOLDER = re.compile(r"\{\{\s*(response_content|current_date|batch_id)\s*\}\}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.globals.clear()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False, default=str)
    return environment


class Variables:
    """Takes the variables of the prompts from documents, and masks personal data if the job wants that."""

    def __init__(self, config: AppConfig) -> None:
        """Resolve the preprocess functions; JobValidationError if one of them or ``phone_region`` is not usable."""
        self._fields = fields = config.fields
        self._id_field = config.schema_config.document_id_field
        self._functions = {name: resolve_function(given, name) for name, given in fields.preprocess_functions.items()}
        self._masking: Masking | None = None
        if config.mask_pii:
            from openai_batch.masking import Masking  # noqa: PLC0415 - loads the phone numbers of all countries

            self._masking = Masking(fields.phone_region)

    def of(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables of *document* as plain values: dicts, lists, texts, numbers, booleans, None.

        Raises JobProcessingError if a field is missing and has no default, or a preprocess function failed.
        """
        if not self._fields.field_map:
            return {str(name): plain(value) for name, value in document.items()}
        values = {}
        for name, path in self._fields.field_map.items():
            try:
                value = value_at(document, path, self._fields.defaults.get(name, MISSING))
            except KeyError as exc:
                document_id = value_at(document, self._id_field, default=document.get("_id"))
                raise JobProcessingError(
                    f"document {id_text(document_id)} has no field {path} (variable {name}); give a default",
                    is_final=True,
                ) from exc
            values[name] = self._preprocess(name, plain(value))
        return values

    def mask(self, document: Document, messages: Messages) -> Mask | None:
        """Return the mask of *document*, whose prompt is *messages*; None if nothing is masked."""
        if self._masking is None:
            return None
        names: list[str] = []
        for name in self._fields.masked:
            with contextlib.suppress(KeyError):
                value = plain(value_at(document, self._fields.field_map[name]))
                names += [*_texts_of(value), *_texts_of(self._preprocess(name, value))]
        texts = [message["content"] for message in messages]
        return self._masking.of(texts, canonical(document.get("_id")), names)

    def hide(self, document: Document, messages: Messages) -> Messages:
        """Return *messages* with placeholders for personal data."""
        mask = self.mask(document, messages)
        if mask is None:
            return messages
        return [{**message, "content": mask.hide(message["content"])} for message in messages]

    def _preprocess(self, name: str, value: Any) -> Any:
        function = self._functions.get(name)
        if function is None:
            return value
        with _failing(f"the preprocess function of {name}"):
            return function(value)


@contextlib.contextmanager
def _failing(function: str, *, is_final: bool = True) -> Iterator[None]:
    """Raise the exceptions of a user's *function* as JobProcessingError, without their text."""
    try:
        yield
    except USER_ERRORS as exc:
        raise JobProcessingError(f"{function} failed ({type(exc).__name__})", is_final=is_final) from exc


def _texts_of(value: Any) -> list[str]:
    """Return the texts and numbers in *value*, at any depth."""
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in _texts_of(inner)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def _checked(messages: Any) -> Messages:
    is_list = isinstance(messages, list) and bool(messages)
    if not is_list or not all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
        for message in messages
    ):
        raise JobProcessingError("build_messages must return [{'role': text, 'content': text}, ...]", is_final=True)
    return messages  # type: ignore[no-any-return]


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


class ChildFunctions:
    """The functions that run in the child process, where an endless loop can be stopped."""

    def __init__(self, config: AppConfig, variables: Variables, processor: ResponseProcessor | None) -> None:
        """Parse the templates; raise JobTemplateError if one is malformed or missing."""
        prompts = config.prompts
        if prompts.build_messages is None and not prompts.user_prompt_template:
            raise JobTemplateError("the job has no prompt: give a PromptConfig, or set USER_PROMPT_TEMPLATE.")
        self._build = prompts.build_messages
        self._system = PromptTemplate("system_prompt", prompts.system_prompt)
        self._user = PromptTemplate("user_prompt_template", prompts.user_prompt_template)
        self._variables, self._is_masked = variables, config.mask_pii
        self._processor = processor

    def prompt(self, document: Document) -> Messages:
        """Return the messages for *document*."""
        return self._variables.hide(document, self._messages(document))

    def _messages(self, document: Document) -> Messages:
        if self._build is not None:
            with _failing("build_messages"):
                return _checked(self._build(document))
        values = self._variables.of(document)
        system, user = self._system.render(values), self._user.render(values)
        messages = [{"role": "system", "content": system}] if system.strip() else []
        return [*messages, {"role": "user", "content": user}]

    def processed(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return what is stored of ``value["content"]`` and how many placeholders are left in it."""
        document, content, left, mask = value["document"], value["content"], 0, None
        if self._is_masked:
            try:
                mask = self._variables.mask(document, self._messages(document))
            except JobProcessingError:  # the document has changed and has no prompt: placeholders stay and are counted
                mask = self._variables.mask(document, [])
        if mask is not None:
            content = mask.restore(content)
            left = mask.unresolved(content)
        if self._processor is not None:
            with _failing(PROCESSOR, is_final=False):
                content = dict(self._processor(content, document))
        return {"content": content, "left": left}


class TemplateHandling(Handling):
    """The default handling: prompts from templates, answers into the documents by the response template.

    Use in ``with``: templates and functions run in a child process.
    """

    def __init__(self, config: AppConfig, processor: ResponseProcessor | None = None) -> None:
        """*processor* returns the stored value of an answer, ``(response, document) -> dict``; None stores the answer.

        Raises JobTemplateError or JobValidationError if a template, a function or ``phone_region`` is not usable.
        """
        self._config = config
        variables = Variables(config)
        # With neither a processor nor masking, answers need no call to the child.
        self._is_processed = processor is not None or config.mask_pii

        def make() -> dict[str, Callable[[Any], Any]]:
            functions = ChildFunctions(config, variables, processor)
            return {PROMPT: functions.prompt, PROCESSOR: functions.processed}

        self._process = RenderProcess(make)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def request(self, document: Document) -> dict[str, Any]:
        """Return the body for *document*, or raise JobProcessingError, which quotes no value.

        Blocks for milliseconds, or for seconds if a template does not end.
        """
        if UNREADABLE in document:
            raise JobProcessingError(str(UnreadableDocumentError()), is_final=True)
        return request_body(self._config.openai, self._process.call(PROMPT, document), is_reasoning=self.is_reasoning)

    async def deliver(self, answers: Sequence[Answer], batch_id: str) -> list[Mapping[str, Any] | JobProcessingError]:
        """Return the update of each document, or why there is none."""
        return await asyncio.to_thread(lambda: [self._update(answer, batch_id) for answer in answers])

    def _update(self, answer: Answer, batch_id: str) -> Mapping[str, Any] | JobProcessingError:
        try:
            return self._usable_update(answer, batch_id)
        except JobProcessingError as exc:
            return exc

    def _usable_update(self, answer: Answer, batch_id: str) -> Mapping[str, Any]:
        content: Any = answer.line.content or ""
        response_format = self._config.openai.response_format
        if response_format is not None and response_format.get("type") != "text":
            try:
                content = json.loads(content)
            except (ValueError, RecursionError) as exc:
                raise JobProcessingError("the answer is not JSON, as response_format asks for") from exc
        require_storable(content)
        left = 0
        if self._is_processed:
            made = self._process.call(PROCESSOR, {"document": answer.document, "content": content})
            content, left = made["content"], made["left"]
            require_storable(content)
        update = response_update(self._config.schema_config, content, datetime.now(UTC), batch_id)
        if left:
            info = self._config.schema_config.processing_info_field
            update.setdefault("$set", {})[f"{info}.placeholders_left"] = left
        return update


def reasons(model: str) -> bool:
    """Return whether OpenAI's *model* writes hidden reasoning first: it refuses a temperature and ``max_tokens``."""
    return _CURRENT.match(model) is not None and "-chat" not in model


def request_body(config: OpenAIConfig, messages: Messages, *, is_reasoning: bool = False) -> dict[str, Any]:
    """Return the body of one chat completion; *is_reasoning*: the model was found to be one, whatever its name."""
    body: dict[str, Any] = {"model": config.model, "messages": messages}
    if not is_reasoning and not reasons(config.model):
        body["temperature"] = config.temperature
    is_current = is_reasoning or _CURRENT.match(config.model)
    body["max_completion_tokens" if is_current else "max_tokens"] = config.max_tokens
    return body if config.response_format is None else body | {"response_format": config.response_format}


def require_storable(content: Any) -> None:
    """Raise JobProcessingError if MongoDB cannot store *content*, or could read one of its keys as more than a name."""
    _require_plain_keys(content)
    try:
        bson_encode({"": content})
    except ValueError as exc:
        raise JobProcessingError("the answer holds a number or a text that MongoDB cannot store") from exc


def _require_plain_keys(content: Any) -> None:
    """Refuse ``$set`` (an operator), ``a.b`` (a path), NUL and empty keys."""
    if isinstance(content, dict):
        for key, inner in content.items():
            if not key or key.startswith("$") or "." in key or "\x00" in key:
                raise JobProcessingError(
                    "the answer has a key that is not a plain name: it begins with $, has a dot or NUL, or is empty"
                )
            _require_plain_keys(inner)
    elif isinstance(content, list):
        for inner in content:
            _require_plain_keys(inner)


def response_update(schema: SchemaConfig, content: Any, now: datetime, batch_id: str) -> dict[str, Any]:
    """Return the update that stores *content* in a document, as *schema* defines."""
    default = {schema.response_content_field: "{{response_content}}", schema.response_date_field: "{{current_date}}"}
    template = schema.response_template or {"$set": {schema.response_field: default}}
    update: dict[str, Any] = fill(template, content, now, batch_id)
    for operator, changes in (schema.update_template or {}).items():
        update.setdefault(operator, {}).update(changes)
    return update


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
    values = {"response_content": content, "current_date": now, "batch_id": batch_id}
    if whole := _PLACEHOLDER.fullmatch(template.strip()):
        return values[whole[1]]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    texts = values | {"response_content": text, "current_date": now.isoformat()}
    return _PLACEHOLDER.sub(lambda match: str(texts[match[1]]), template)
