"""Request and response bodies of POST /classify, and the conversation in a request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from aggregator import aggregate_conversation
from config import Taxonomy
from config.service_settings import ServiceSettings
from domain.conversation import Conversation
from error_handler import RequestError, SkippedDocumentError
from service import errors

MAX_NUMBER_CHARACTERS = 200
MAX_TIMESTAMP_CHARACTERS = 64

_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z_]{0,39}[0-9]?")
# A character that ``prompt_text`` keeps and that is not white space.
VISIBLE = r"[^\s\x00-\x1f\x7f-\xa0\u1680\u2000-\u200b\u2028-\u202f\u205f\u2060\u2066-\u2069\u3000\ufeff]"

EXAMPLE_REQUEST: dict[str, Any] = {
    "conversation_number": "123",
    "messages": [
        {
            "sender": "customer",
            "timestamp": "2026-11-21T10:00:00Z",
            "text": "My parcel should have been here on Monday. Where is it? This is the second time!",
        },
        {
            "sender": "agent",
            "timestamp": "2026-11-21T10:01:00Z",
            "text": "I am sorry to hear that. Could you tell me the order number?",
        },
    ],
}
EXAMPLE_LABELS: dict[str, Any] = {
    "intent": "Order Status",
    "topic": "Shipping/Delivery",
    "sentiment": "Negative",
    "categorization": "The customer asks about a parcel that is late for the second time.",
}


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sender: Literal["customer", "agent"] = Field(
        description="who wrote it; sentiment is judged from the customer's messages only"
    )
    timestamp: str | None = Field(
        None,
        max_length=MAX_TIMESTAMP_CHARACTERS,
        description="when, ISO 8601 (UTC if it names no zone); messages are sorted by time if every one of them has a "
        "readable timestamp, otherwise their order is kept",
        examples=["2026-11-21T10:00:00Z"],
    )
    text: str = Field(description="what was written; a message without visible text is ignored")


class ClassificationRequest(BaseModel):
    """One conversation."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE_REQUEST]})

    conversation_number: str = Field(
        min_length=1,
        max_length=MAX_NUMBER_CHARACTERS,
        description="the caller's own number; the response repeats it",
    )
    # FailFast: a body of thousands of invalid messages must not become thousands of errors in memory.
    messages: Annotated[list[Message], FailFast()] = Field(
        min_length=1,
        description="all messages; at least one from the customer with visible text",
        json_schema_extra={"contains": {"properties": {"sender": {"const": "customer"}, "text": {"pattern": VISIBLE}}}},
    )


class Labels(BaseModel):
    """The classification of the conversation; the labels are those of the taxonomy.

    Its fields are those of the taxonomy, which is read at the start: see ``labels_schema``. Each is an attribute.
    """

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, str | list[str]]

    if TYPE_CHECKING:

        def __getattr__(self, field: str) -> Any: ...


FIELD_DESCRIPTIONS = {  # of the shipped fields, which have no definition in a file
    "intent": "what the customer wants",
    "topic": "what it is about",
    "sentiment": "how the customer feels",
}


def labels_schema(taxonomy: Taxonomy, *, is_closed: bool = True, has_sentence: bool = True) -> dict[str, Any]:
    """Return the JSON Schema of Labels; without *has_sentence*, an answer may lack the categorization.

    Its labels are listed if *is_closed*. Otherwise a field may have any label or none, as in a conversation that was
    labelled with an earlier taxonomy.
    """
    properties: dict[str, Any] = {}
    for field in taxonomy.fields:
        name = field.name
        shown: dict[str, Any] = {"type": "string"}
        if is_closed:
            shown["enum"] = list(field.names)
        if field.is_multiple:
            shown = {"type": "array", "items": shown, **({"minItems": 1} if is_closed else {}), "uniqueItems": True}
        title = {"title": name.replace("_", " ").title()}
        description = FIELD_DESCRIPTIONS.get(name) or field.definition
        properties[name] = {**shown, **title, **({"description": description} if description else {})}
    if taxonomy.has_categorization:
        properties["categorization"] = {
            "type": "string",
            "title": "Categorization",
            "description": "one line in plain words",
        }
    return {
        "properties": properties,
        "type": "object",
        "required": [name for name in properties if has_sentence or name != "categorization"],
        "title": "Labels" if is_closed else "PastLabels",
        "description": "The classification of the conversation; the labels are those of the taxonomy.",
    }


class ClassificationResponse(BaseModel):
    """The conversation as it was sent, and its labels."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**EXAMPLE_REQUEST, "classification": EXAMPLE_LABELS}]})

    conversation_number: str = Field(description="as sent")
    messages: list[Message] = Field(description="all of them, as sent")
    classification: Labels


class ConversationAnswer(ClassificationResponse):
    """The result of ``classify_conversation``. ``model_dump`` returns the body of the HTTP response."""

    input_complete: bool = Field(
        exclude=True,
        description="False if the conversation did not fit into the context window and the model saw a part of it",
    )


class ErrorDetail(BaseModel):
    """The kind and message of an error. Never quotes the request."""

    type: str = Field(description="one of a closed list")
    message: str = Field(description="one sentence: what is wrong and what to do")


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def conversation_of(request: ClassificationRequest, settings: ServiceSettings) -> Conversation:
    """Return the conversation in *request*.

    Raises:
        RequestError: INVALID if it exceeds a limit of *settings* or has no text from the customer.
    """
    if len(request.messages) > settings.max_messages:
        raise RequestError(errors.INVALID, f"messages: at most {settings.max_messages} are allowed; send fewer.")
    limit = settings.max_text_characters
    if sum(len(message.text) for message in request.messages) > limit:
        raise RequestError(errors.INVALID, f"messages: the texts exceed {limit} characters in total; send less text.")
    try:
        return aggregate_conversation(request.model_dump())
    except SkippedDocumentError as exc:
        raise RequestError(errors.INVALID) from exc


def invalid_request(problems: Iterable[Mapping[str, Any]]) -> RequestError:
    """Return the INVALID error for the first three validation *problems*.

    It names the fields and never quotes the request. Names of unknown fields, and of those of a mapping, are part of the
    request as well, so they are shown only if they are plain names.
    """
    sentences = []
    for problem in list(problems)[:3]:
        unknown = problem["type"] == "extra_forbidden"
        name = str(problem["loc"][-1])
        source, *path = problem["loc"][: -1 if unknown else None]
        shown = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if _is_shown(part)]
        place = "".join(shown).lstrip(".")
        fault = problem["msg"].removeprefix("Input ")
        if unknown:
            fault = f"unknown field {name}" if _is_shown(name) else "unknown field"
        sentences.append(f"{place or source}: {fault}")
    return RequestError(errors.INVALID, "; ".join(sentences) + ".")


def _is_shown(part: str | int) -> bool:
    return isinstance(part, int) or _PLAIN_NAME.fullmatch(part) is not None
