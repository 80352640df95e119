"""The bodies of GET and POST /similar. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from config.service_settings import ServiceSettings
from domain.text import prompt_text
from embedding_index.items import Hit
from error_handler import RequestError
from service import errors
from service.contract import Labels, places_of
from service.openapi_document import DEFAULT_HITS, MAX_HITS, query_characters, search_characters


class SimilarRequest(BaseModel):
    """What to look for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = Field(
        min_length=1, description="what a customer wrote, in any words: past conversations like it are found"
    )
    limit: int = Field(DEFAULT_HITS, ge=1, le=MAX_HITS, description="the most conversations in the answer")

    @field_validator("limit", mode="before")
    @classmethod
    def _whole_number(cls, value: object) -> object:
        """To JSON 4.0 is an integer, too."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


class SimilarConversation(BaseModel):
    """One past conversation, and what it was about."""

    source_id: str = Field(description="its `_id` in MongoDB as Extended JSON, which keeps the type")
    conversation_number: str | None = Field(description="the help desk's own number; null where it has none")
    similarity: float = Field(ge=-1, le=1, description="cosine of the two texts; 1 means the same")
    classification: Labels
    classified_at: str | None = Field(description="when, ISO 8601; null where the result does not say")
    classified_by: str | None = Field(description="the model that gave the labels; null likewise")


class SimilarResponse(BaseModel):
    """Past conversations, the most similar one first."""

    model: str = Field(description="the embedding model; similarities of different models cannot be compared")
    hits: list[SimilarConversation]


def parse_query(query: bytes, settings: ServiceSettings) -> SimilarRequest:
    """Return what the query string of GET /similar asks for.

    Raises:
        RequestError: INVALID; the message quotes nothing.
    """
    try:
        pairs = parse_qsl(query.decode(), keep_blank_values=True, errors="strict", max_num_fields=10)
    except ValueError as exc:  # UnicodeDecodeError is one
        raise RequestError(errors.INVALID, "The query is not percent-encoded UTF-8; encode the text.") from exc
    fields: dict[str, Any] = dict(pairs)
    if len(fields) != len(pairs):
        raise RequestError(errors.INVALID, "The query names a parameter twice; name text and limit once.")
    limit = fields.get("limit", "")
    if limit.isascii() and limit.isdecimal() and len(limit) < 10 and not limit.startswith("0"):
        fields["limit"] = int(limit)
    most = query_characters(settings)
    if len(fields.get("text", "")) > most:
        raise RequestError(
            errors.INVALID, f"text: at most {most} characters are taken in a URL; send less, or use POST /similar."
        )
    return parse_search(fields, settings)


def parse_search(fields: Mapping[str, Any], settings: ServiceSettings) -> SimilarRequest:
    """Return what *fields* ask for, the text made safe as those in the index.

    Raises:
        RequestError: INVALID; the message names the place and quotes nothing.
    """
    try:
        wanted = SimilarRequest.model_validate(fields)
    except ValidationError as exc:
        raise RequestError(errors.INVALID, places_of(exc)) from exc
    most = search_characters(settings)
    if len(wanted.text) > most:
        raise RequestError(errors.INVALID, f"text: at most {most} characters are taken; send less text.")
    text = prompt_text(wanted.text)
    if not text:
        raise RequestError(errors.INVALID, "text: it needs a visible character.")
    return wanted.model_copy(update={"text": text})


def similar_response(model: str, hits: Sequence[Hit]) -> SimilarResponse:
    """Return the answer that shows *hits*, which are conversations."""
    return SimilarResponse(model=model, hits=[_shown(hit) for hit in hits])


def _shown(hit: Hit) -> SimilarConversation:
    facts = hit.metadata
    return SimilarConversation(
        source_id=hit.name,
        conversation_number=_text(facts.get("conversation_number")),
        similarity=round(max(-1.0, min(1.0, hit.similarity)), 4),
        classification=Labels(**{label: str(facts.get(label, "")) for label in Labels.model_fields}),
        classified_at=_text(facts.get("classified_at")),
        classified_by=_text(facts.get("classified_by")),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
