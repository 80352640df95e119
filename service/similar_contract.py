"""Request and response models of GET and POST /similar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from domain.text import prompt_text
from error_handler import RequestError
from service import errors
from service.contract import EXAMPLE_LABELS, VISIBLE, Labels

if TYPE_CHECKING:  # it needs numpy, which may be missing
    from embedding_index.search_entries import Hit

DEFAULT_HITS, MAX_HITS = 5, 50
# In a body and in a URL. One character may take twelve bytes of a URL, and a URL has at most 64 KiB.
MAX_SEARCH_CHARACTERS, MAX_QUERY_CHARACTERS = 10_000, 2000

EXAMPLE_SEARCH: dict[str, Any] = {"text": "My parcel has not come, and nobody answers.", "limit": 5}
EXAMPLE_HITS: dict[str, Any] = {
    "model": "all-MiniLM-L6-v2",
    "hits": [
        {
            "source_id": '{"$oid": "65f1c0ffee65f1c0ffee65f1"}',
            "conversation_number": "123",
            "similarity": 0.7421,
            "classification": EXAMPLE_LABELS,
            "classified_at": "2026-11-21T10:02:00+00:00",
            "classified_by": "llama3.2",
        }
    ],
}


class SimilarRequest(BaseModel):
    """The text to search for."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE_SEARCH]})

    text: str = Field(
        min_length=1,
        description="what a customer wrote, in any words",
        examples=[EXAMPLE_SEARCH["text"]],
        json_schema_extra={"pattern": VISIBLE},
    )
    limit: int = Field(DEFAULT_HITS, ge=1, le=MAX_HITS, description="maximum number of conversations in the answer")

    @field_validator("limit", mode="before")
    @classmethod
    def _whole_number(cls, value: object) -> object:
        """Accept 4.0, which is an integer in JSON Schema."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


class SimilarQuery(SimilarRequest):
    """The same as the parameters of a URL, which are strings."""

    model_config = ConfigDict(strict=False)


class SimilarConversation(BaseModel):
    """A past conversation and its labels."""

    source_id: str = Field(description="its `_id` in MongoDB as Extended JSON, which keeps the type")
    conversation_number: str | None = Field(description="the help desk's own number; null if it has none")
    similarity: float = Field(ge=-1, le=1, description="cosine similarity of the two texts; 1 means identical")
    classification: Labels
    classified_at: str | None = Field(description="when, ISO 8601; null if unknown")
    classified_by: str | None = Field(description="the model that gave the labels; null if unknown")


class SimilarResponse(BaseModel):
    """Past conversations, the most similar one first."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_HITS]})

    model: str = Field(description="the embedding model; similarities of different models cannot be compared")
    hits: list[SimilarConversation]


def searched_text(text: str, max_characters: int) -> str:
    """Return *text* as the index has it: without invisible characters.

    Raises:
        RequestError: INVALID if it is longer than *max_characters*, or nothing of it is visible.
    """
    if len(text) > max_characters:
        raise RequestError(errors.INVALID, f"text: at most {max_characters} characters are allowed; send less text.")
    visible = prompt_text(text)
    if not visible:
        raise RequestError(errors.INVALID, "text: needs at least one visible character.")
    return visible


def similar_response(model: str, hits: Sequence[Hit]) -> SimilarResponse:
    """Return the response for *hits*, which are conversations."""
    return SimilarResponse(model=model, hits=[_shown(hit) for hit in hits])


def _shown(hit: Hit) -> SimilarConversation:
    facts = {name: str(value) for name, value in hit.metadata.items() if value is not None}
    return SimilarConversation(
        source_id=hit.name,
        conversation_number=facts.get("conversation_number"),
        similarity=round(max(-1.0, min(1.0, hit.similarity)), 4),
        classification=Labels(**{label: facts.get(label, "") for label in Labels.model_fields}),
        classified_at=facts.get("classified_at"),
        classified_by=facts.get("classified_by"),
    )
