"""Reads the corrections of reviewers as gold labels. The only module here that knows the shape of their collection."""

from __future__ import annotations

from datetime import UTC, datetime

from evaluation.gold import Gold
from evaluation.sources import Collections
from evaluation.values import Problem, Spelling
from storage.extended_json import Document, id_key, id_text

FIELDS = ("source_conversation_id", "conversation_number", "field", "to", "at", "sampling_probability")
BIAS = (
    "Reviewers see uncertain labels first, so the accuracy of all results is probably higher. --gold control uses only the "
    "conversations that were drawn at random."
)


def corrections_name(results: str) -> str:
    """Return the name of the collection that holds the corrections of the results collection *results*."""
    return f"{results}_corrections"


async def read_corrections(collections: Collections, results: str, spelling: Spelling, *, is_control: bool) -> Gold:
    """Return the latest correction of each field; an accepted label is a correction to itself.

    *is_control* leaves only conversations of the random control sample, which have a sampling probability.
    """
    name = corrections_name(results)
    gold = Gold(f"corrections in {name}", note="" if is_control else BIAS)
    query = {"sampling_probability": {"$ne": None}} if is_control else {}
    seen: set[tuple[bytes, str]] = set()
    documents = [document async for page in collections.pages(name, FIELDS, query) for document in page]
    documents.sort(key=_time, reverse=True)
    for document in documents:
        document_id, field = document.get("source_conversation_id"), str(document.get("field"))
        place = f"correction of {id_text(document_id)}"
        if (id_key(document_id), field) in seen:
            gold.problems.append(Problem("superseded", place, field))
            continue
        seen.add((id_key(document_id), field))
        flat = {"source_conversation_id": document_id, "conversation_number": document.get("conversation_number")}
        gold.add(place, {**flat, field: document.get("to")}, spelling)
    return gold


def _time(correction: Document) -> float:
    at = correction.get("at")
    return at.replace(tzinfo=UTC).timestamp() if isinstance(at, datetime) else 0.0  # MongoDB's dates are in UTC
