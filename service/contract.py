"""Request and response bodies of POST /classify, and how a request becomes a Conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aggregator import aggregate_conversation
from config.service_settings import ServiceSettings
from domain.conversation import Conversation
from error_handler import RequestError, SkippedDocumentError
from service import errors

MAX_NUMBER_CHARACTERS = 200
MAX_TIMESTAMP_CHARACTERS = 64


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sender: Literal["customer", "agent"] = Field(
        description="who wrote it; sentiment is judged from the customer's alone"
    )
    timestamp: str | None = Field(
        None,
        max_length=MAX_TIMESTAMP_CHARACTERS,
        description="when, ISO 8601 (UTC where it names no zone); where every message has a readable one, "
        "they count in the order of time, else as listed",
        examples=["2026-11-21T10:00:00Z"],
    )
    text: str = Field(description="what was written; a message without visible text is left out")


class ClassificationRequest(BaseModel):
    """One conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    conversation_number: str = Field(
        min_length=1,
        max_length=MAX_NUMBER_CHARACTERS,
        description="the caller's own number; it comes back in the answer",
    )
    messages: list[Message] = Field(
        min_length=1, description="all messages; at least one of the customer with visible text"
    )


class Labels(BaseModel):
    """What the conversation is about; labels are those of the taxonomy."""

    intent: str = Field(description="what the customer wants")
    topic: str = Field(description="what it is about")
    sentiment: str = Field(description="how the customer feels")
    categorization: str = Field(description="one line in plain words")


class ClassificationResponse(BaseModel):
    """The conversation as it was sent, and its labels."""

    conversation_number: str = Field(description="as sent")
    messages: list[Message] = Field(description="all of them, as sent")
    classification: Labels


class ConversationAnswer(ClassificationResponse):
    """What ``classify_conversation`` returns: dumped, it is the response, and it has what HTTP tells in a header."""

    input_complete: bool = Field(
        exclude=True,
        description="False where the conversation is longer than the model's window: the labels are of what fits of it",
    )


class ErrorDetail(BaseModel):
    """What went wrong, without anything that was sent."""

    type: str = Field(description="one of a closed list")
    message: str = Field(description="one sentence: what is wrong and what to do")


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def parse_request(fields: Mapping[str, Any], settings: ServiceSettings) -> Conversation:
    """Return the conversation in a request body within the limits of *settings*.

    Raises:
        RequestError: INVALID; the message names the place and quotes nothing.
    """
    messages = fields.get("messages")
    if isinstance(messages, list) and len(messages) > settings.max_messages:
        raise RequestError(errors.INVALID, f"messages: at most {settings.max_messages} are taken; send fewer.")
    try:
        request = ClassificationRequest.model_validate(fields)
    except ValidationError as exc:
        raise RequestError(errors.INVALID, places_of(exc)) from exc
    if sum(len(message.text) for message in request.messages) > settings.max_text_characters:
        limit = settings.max_text_characters
        raise RequestError(
            errors.INVALID, f"messages: their texts may have {limit} characters together; send less text."
        )
    try:
        return aggregate_conversation(fields)
    except SkippedDocumentError as exc:
        raise RequestError(errors.INVALID) from exc


def places_of(exc: ValidationError) -> str:
    """Return what is wrong where, of the first three problems. The name of an unknown field is the caller's: left out."""
    problems = []
    for error in exc.errors(include_input=False, include_url=False, include_context=False)[:3]:
        unknown = error["type"] == "extra_forbidden"
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][: -1 if unknown else None]
        ).lstrip(".")
        fault = "there is a field that is not known" if unknown else error["msg"].removeprefix("Input ")
        if error["type"] == "model_type":
            fault = "should be an object"
        problems.append(f"{place or 'body'}: {fault}")
    return "; ".join(problems) + "."
