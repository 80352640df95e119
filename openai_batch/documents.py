"""A document becomes the body of a request, and an answer the update of its document."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from error_handler import JobProcessingError, JobTemplateError
from openai_batch.answers import Answer
from openai_batch.job_config import (
    AppConfig,
    Document,
    DocumentFields,
    Messages,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
)
from openai_batch.render_process import RenderProcess
from openai_batch.templates import PromptTemplate, fill
from openai_batch.user_functions import FUNCTION_ERRORS, resolve_function
from storage.extended_json import bson_encode, canonical, id_text, plain

if TYPE_CHECKING:
    from openai_batch.masking import Mask, Masking

ResponseProcessor = Callable[[Any, Document], Mapping[str, Any]]

# What runs in the process of the templates, as errors call it.
PROMPT, PROCESSOR = "the prompt", "the response processor"

_MISSING = object()


def value_at(document: Mapping[str, Any], path: str) -> Any:
    """Return the value at *path*, names and places in lists joined by dots.

    Raises:
        KeyError: There is none.
    """
    value: Any = document
    for name in path.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise KeyError(path)
    return value


class Variables:
    """Takes the variables of the prompts from documents."""

    def __init__(self, fields: DocumentFields, id_field: str = "_id") -> None:
        """Resolve the preprocess functions; see resolve_function. Errors name a document by its *id_field*."""
        self._fields = fields
        self._id_field = id_field
        self._functions = {name: resolve_function(given, name) for name, given in fields.preprocess_functions.items()}

    def of(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables of *document* as plain values: dicts, lists, texts, numbers, true, false, None.

        Raises:
            JobProcessingError: A field is missing and has no default, or a preprocess function failed. The message
                names document and field.
        """
        if not self._fields.field_map:
            return {str(name): plain(value) for name, value in document.items()}
        values = {}
        for name, path in self._fields.field_map.items():
            try:
                value = value_at(document, path)
            except KeyError:
                value = self._fields.defaults.get(name, _MISSING)
            if value is _MISSING:
                raise JobProcessingError(
                    f"document {self._name_of(document)} has no field {path} (variable {name}); give a default",
                    is_final=True,
                )
            values[name] = self._preprocessed(name, plain(value))
        return values

    def masked(self, document: Mapping[str, Any]) -> list[str]:
        """Return the texts of the masked variables, as the document and as the preprocess functions give them."""
        texts: list[str] = []
        for name in self._fields.masked:
            with contextlib.suppress(KeyError):
                value = plain(value_at(document, self._fields.field_map[name]))
                texts += [*_texts_of(value), *_texts_of(self._preprocessed(name, value))]
        return texts

    def _name_of(self, document: Mapping[str, Any]) -> str:
        try:
            return id_text(value_at(document, self._id_field))
        except KeyError:
            return id_text(document.get("_id"))

    def _preprocessed(self, name: str, value: Any) -> Any:
        function = self._functions.get(name)
        if function is None:
            return value
        try:
            return function(value)
        except FUNCTION_ERRORS as exc:
            raise JobProcessingError(
                f"the preprocess function of {name} failed ({type(exc).__name__})", is_final=True
            ) from exc


def _texts_of(value: Any) -> list[str]:
    """Return the texts and numbers in *value*, at any depth."""
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in _texts_of(inner)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def _require_messages(made: Any) -> Messages:
    """Return *made*, what build_messages returned, where it is chat messages."""
    is_list = isinstance(made, list) and bool(made)
    if not is_list or not all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
        for message in made
    ):
        raise JobProcessingError("build_messages must return [{'role': text, 'content': text}, ...]", is_final=True)
    return made  # type: ignore[no-any-return]


class PromptMaker:
    """Makes chat messages of documents, by templates or by a function of the schema."""

    def __init__(self, prompts: PromptConfig, variables: Variables) -> None:
        """Parse the templates.

        Raises:
            JobTemplateError: One is malformed, or there is none.
        """
        if prompts.build_messages is None and not prompts.user_prompt_template:
            raise JobTemplateError("the job has no prompt: give a PromptConfig, or set USER_PROMPT_TEMPLATE.")
        self._build = prompts.build_messages
        self._variables = variables
        self._system = PromptTemplate("system_prompt", prompts.system_prompt)
        self._user = PromptTemplate("user_prompt_template", prompts.user_prompt_template)

    def messages(self, document: Document) -> Messages:
        """Return the messages for *document*.

        Raises:
            JobProcessingError: There are none for it; the message says why and quotes no value.
        """
        if self._build is not None:
            try:
                return _require_messages(self._build(document))
            except FUNCTION_ERRORS as exc:
                raise JobProcessingError(f"build_messages failed ({type(exc).__name__})", is_final=True) from exc
        values = self._variables.of(document)
        system, user = self._system.render(values), self._user.render(values)
        messages = [{"role": "system", "content": system}] if system.strip() else []
        return [*messages, {"role": "user", "content": user}]


def request_body(config: OpenAIConfig, messages: Messages) -> dict[str, Any]:
    """Return the body of one chat completion."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }
    if config.response_format is not None:
        body["response_format"] = config.response_format
    return body


class ChildSide:
    """What runs in the process of the templates: nothing here is trusted to end."""

    def __init__(self, config: AppConfig, variables: Variables, processor: ResponseProcessor | None) -> None:
        """Parse the templates; see PromptMaker."""
        self._maker = PromptMaker(config.prompts, variables)
        self._variables = variables
        self._masking = masking_of(config)
        self._processor = processor

    def functions(self) -> dict[str, Callable[[Any], Any]]:
        """Return them by their names in errors."""
        return {PROMPT: self.messages, PROCESSOR: self.processed}

    def messages(self, document: Document) -> Messages:
        """Return the messages for *document*, masked where the job asks for it."""
        messages = self._maker.messages(document)
        return messages if self._masking is None else hidden(messages, self._mask(document, messages))

    def processed(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return what is stored of ``value["content"]``, and how many placeholders are left in it."""
        document, content, left = value["document"], value["content"], 0
        if self._masking is not None:
            mask = self._mask_again(document)
            content = mask.restore(content)
            left = mask.strangers(content)
        if self._processor is not None:
            try:
                content = dict(self._processor(content, document))
            except FUNCTION_ERRORS as exc:
                raise JobProcessingError(f"{PROCESSOR} failed ({type(exc).__name__})") from exc
        return {"content": content, "left": left}

    def _mask_again(self, document: Document) -> Mask:
        try:
            return self._mask(document, self._maker.messages(document))
        except JobProcessingError:  # the document has changed: nothing can be put back, and it will say so
            return self._mask(document, [])

    def _mask(self, document: Document, messages: Messages) -> Mask:
        assert self._masking is not None  # noqa: S101 - asked by both callers
        return mask_of(self._masking, document, messages, self._variables)


def masking_of(config: AppConfig) -> Masking | None:
    """Return what hides personal data, None where *config* does not ask for it."""
    if not config.mask_pii:
        return None
    from openai_batch.masking import Masking  # noqa: PLC0415 - loads the phone numbers of all countries

    return Masking(config.fields.phone_region)


def mask_of(masking: Masking, document: Document, messages: Messages, variables: Variables) -> Mask:
    """Return the mask of one document and its prompt."""
    texts = [message["content"] for message in messages]
    return masking.of(texts, canonical(document.get("_id")), variables.masked(document))


def hidden(messages: Messages, mask: Mask) -> Messages:
    """Return *messages* with placeholders."""
    return [{**message, "content": mask.hide(message["content"])} for message in messages]


class TemplateHandling:
    """What a job does by default: prompts from templates, answers into the documents by the response template.

    Use in ``with``, or ``close`` it: templates and functions run in a process of their own.
    """

    def __init__(self, config: AppConfig, processor: ResponseProcessor | None = None) -> None:
        """*processor* makes the stored value of an answer, ``(response, document) -> dict``; None stores it as it is.

        Raises:
            JobTemplateError: A template is not usable.
            JobValidationError: A function or ``phone_region`` is not.
        """
        self._config = config
        masking_of(config)
        variables = Variables(config.fields, config.schema_config.document_id_field)
        # Without either, the answer needs no visit to the process.
        self._is_processed = processor is not None or config.mask_pii
        self._process = RenderProcess(lambda: ChildSide(config, variables, processor).functions())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process of the templates."""
        self._process.close()

    def request(self, document: Document) -> dict[str, Any]:
        """Return the body for *document*; blocks for milliseconds, for seconds where a template does not end.

        Raises:
            JobProcessingError: There is none for it; the message says why and quotes no value.
        """
        return request_body(self._config.openai, self._process.call(PROMPT, document))

    async def deliver(self, answers: Sequence[Answer], batch_id: str) -> list[Mapping[str, Any] | JobProcessingError]:
        """Return the update of each document, or why there is none."""
        if self._is_processed:
            return await asyncio.to_thread(self._delivered_all, answers, batch_id)
        return self._delivered_all(answers, batch_id)

    def _delivered_all(self, answers: Sequence[Answer], batch_id: str) -> list[Mapping[str, Any] | JobProcessingError]:
        now = datetime.now(UTC)
        made: list[Mapping[str, Any] | JobProcessingError] = []
        for answer in answers:
            try:
                made.append(self._delivered(answer, batch_id, now))
            except JobProcessingError as exc:
                made.append(exc)
        return made

    def _delivered(self, answer: Answer, batch_id: str, now: datetime) -> Mapping[str, Any]:
        content: Any = answer.line.content or ""
        if self._config.openai.response_format is not None:
            content = parsed(content)
        require_storable(content)
        left = 0
        if self._is_processed:
            made = self._process.call(PROCESSOR, {"document": answer.document, "content": content})
            content, left = made["content"], made["left"]
            require_storable(content)
        update = response_update(self._config.schema_config, content, now, batch_id)
        if left:  # the document says so itself
            info = self._config.schema_config.processing_info_field
            update.setdefault("$set", {})[f"{info}.placeholders_left"] = left
        return update


def parsed(content: str) -> Any:
    """Return the value of an answer that must be JSON.

    Raises:
        JobProcessingError: It is none, or nested deeper than anything reads.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise JobProcessingError("the answer is not JSON, as response_format asks for") from exc


def require_storable(content: Any) -> None:
    """Raise JobProcessingError where MongoDB would not take *content*, or its keys for names only."""
    _require_plain_keys(content)
    try:
        bson_encode({"": content})
    except ValueError as exc:
        raise JobProcessingError("the answer holds a number or a text that MongoDB cannot hold") from exc


def _require_plain_keys(content: Any) -> None:
    """Refuse ``$set``, ``a.b``, NUL and nothing: operators, paths, and what only some servers take."""
    if isinstance(content, dict):
        for key, inner in content.items():
            if not key or key.startswith("$") or "." in key or "\x00" in key:
                raise JobProcessingError(
                    "the answer has a key that MongoDB would not take for a plain name ($, a dot, NUL or nothing)"
                )
            _require_plain_keys(inner)
    elif isinstance(content, list):
        for inner in content:
            _require_plain_keys(inner)


def response_update(schema: SchemaConfig, content: Any, now: datetime, batch_id: str) -> dict[str, Any]:
    """Return the update that puts *content* into a document, as *schema* says."""
    template = schema.response_template or {
        "$set": {
            schema.response_field: {
                schema.response_content_field: "{{response_content}}",
                schema.response_date_field: "{{current_date}}",
            }
        }
    }
    update: dict[str, Any] = fill(template, content, now, batch_id)
    for operator, changes in (schema.update_template or {}).items():
        update.setdefault(operator, {}).update(changes)
    return update
