"""Conversations, their labels, the outcome of a classification, and the result document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

Sender = Literal["customer", "agent", "unknown"]
Shape = Literal["tweets", "messages", "query"]

PROCESSOR_VERSION = "1.0.0"

Message = dict[str, str]  # a chat message: role and content


def chat_messages(system_prompt: str, transcript: str) -> list[Message]:
    """Return *system_prompt* and *transcript*, which may be truncated, as a system message and a user message."""
    return [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": f"<conversation>\n{transcript}\n</conversation>"},
    ]


# The fields of a source document that aggregator, StalenessChecker and is_query use. The others, such as attachments,
# are not read.
SOURCE_FIELDS = (
    *("tweets", "messages", "text", "conversation_number"),
    *("status", "status_reason", "processed", "processing_attempts"),
)

SPEAKER = {"customer": "Customer", "agent": "Agent", "unknown": "Unknown"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; *at* is an aware time (UTC offset kept), or None if the document has no readable time."""

    sender: Sender
    text: str
    at: datetime | None = None

    @property
    def line(self) -> str:
        """The text after its speaker. Further lines are indented, so that no text can look like another turn."""
        return f"{SPEAKER[self.sender]}: {self.text}".replace("\n", "\n    ")


@dataclass(frozen=True)
class Conversation:
    """A conversation in order, with at least one customer turn; *turns_total* includes turns without usable text.

    *is_ordered* is False if the times of the turns are missing or unreadable, so they are in the order of the document.
    """

    shape: Shape
    conversation_number: str | None
    turns: tuple[Turn, ...]
    turns_total: int
    is_ordered: bool = True

    @cached_property
    def transcript(self) -> str:
        """The turns with their speakers, in order."""
        return "\n".join(turn.line for turn in self.turns)

    @cached_property
    def transcript_sha256(self) -> str:
        """The SHA-256 of the whole ``transcript`` (speakers, texts, their order), before truncation: 64 hex digits."""
        return hashlib.sha256(self.transcript.encode()).hexdigest()

    @property
    def customer_texts(self) -> list[str]:
        """The texts of the customer's turns, in order."""
        return [turn.text for turn in self.turns if turn.sender == "customer"]


@dataclass(frozen=True, slots=True, init=False)
class Classification:
    """The labels by field, all of the taxonomy and in its order, and a one-line categorization, None without one.

    A multi-valued field has a tuple of labels. Each field is an attribute too: ``classification.intent``.
    """

    labels: Mapping[str, str | tuple[str, ...]] = field(init=False)
    categorization: str | None = field(init=False)

    def __init__(self, /, *, categorization: str | None = None, **labels: str | Iterable[str]) -> None:
        """Store one keyword for each field: a label, or the labels of a multi-valued field."""
        kept = {name: label if isinstance(label, str) else tuple(label) for name, label in labels.items()}
        object.__setattr__(self, "labels", kept)
        object.__setattr__(self, "categorization", categorization)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.labels[name]
        except KeyError:
            raise AttributeError(f"the classification has no field {name}") from None

    def as_dict(self) -> dict[str, str | list[str]]:
        """Return the fields in the order in which results store them, the labels of a multi-valued field as a list."""
        stored = {name: label if isinstance(label, str) else list(label) for name, label in self.labels.items()}
        return stored if self.categorization is None else {**stored, "categorization": self.categorization}


def stored_labels(classification: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the labels by field of a *classification* as a result stores it; other values are left out."""
    found: dict[str, list[str]] = {}
    for name, value in classification.items():
        if isinstance(value, str) and name != "categorization":
            found[name] = [value]
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            found[name] = value
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """A classification and how it was made.

    *input_sha256* covers the whole transcript; *fingerprint* covers transcript, prompt, schema, model and options; *plan* is
    its part without the transcript, the same for all results of a prompt (empty: unknown).
    *attempts* counts model calls, repair turns included (0: none, the labels were copied). *duration_ms* spans from the
    first call to the last answer. Token counts and digest are None if the server does not report them.
    *input_complete* is False if the model saw only *turns_used* of the turns, or a part of one (None: all of them).
    *confidence* maps each field to the probability of its label (0 to 1), None if unknown.
    *copied_from* holds the source id of the identical conversation whose labels were copied, or is empty.
    """

    classification: Classification
    model_used: str
    model_digest: str | None
    input_sha256: str
    fingerprint: str
    attempts: int = 1
    duration_ms: int = 0
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    input_complete: bool = True
    turns_used: int | None = None
    confidence: dict[str, float] | None = None
    copied_from: tuple[Any, ...] = ()
    plan: str = ""


def result_fingerprint(plan: str, input_hash: str) -> str:
    """Return the fingerprint of a result from a ``protocol.plan_fingerprint`` and a ``transcript_sha256``."""
    return hashlib.sha256(f"{plan}:{input_hash}".encode()).hexdigest()


def build_result(
    document: Mapping[str, Any],
    conversation: Conversation,
    outcome: Outcome,
    job_id: str,
    *,
    keep_original: bool,
    review_below: float | None = None,
) -> dict[str, Any]:
    """Return the result of *document*, without an ``_id``; *keep_original* adds a copy of the document.

    With *review_below* (0 to 1), a result with confidence says whether one of its labels is below that.
    """
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "conversation_number": conversation.conversation_number,
        "source_conversation_id": document.get("_id"),
    }
    if conversation.shape == "query":
        result["query_id"] = document.get("_id")
    result["classification"] = outcome.classification.as_dict()
    result["processing_metadata"] = {
        "processed_at": now,
        "model_used": outcome.model_used,
        "model_digest": outcome.model_digest,
        "processing_duration_ms": outcome.duration_ms,
        "processor_version": PROCESSOR_VERSION,
        "batch_job_id": job_id,
        "attempts": outcome.attempts,
        "prompt_tokens": outcome.prompt_tokens,
        "reply_tokens": outcome.reply_tokens,
        "input_complete": outcome.input_complete,
        "turns_used": len(conversation.turns) if outcome.turns_used is None else outcome.turns_used,
        "turns_total": conversation.turns_total,
        "input_sha256": outcome.input_sha256,
        "fingerprint": outcome.fingerprint,
    }
    if outcome.plan:
        result["processing_metadata"]["plan"] = outcome.plan
    if not conversation.is_ordered:
        result["processing_metadata"]["turn_order"] = "listed"
    if outcome.confidence is not None:
        result["processing_metadata"]["confidence"] = outcome.confidence
        if review_below is not None:
            result["processing_metadata"]["needs_review"] = min(outcome.confidence.values()) < review_below
    for origin in outcome.copied_from:
        result["processing_metadata"]["copied_from"] = origin
    result["created_at"] = now
    if keep_original:
        result["original_conversation"] = dict(document)
    return result
