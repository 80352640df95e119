"""Conversations, their labels, the outcome of a classification, and the result document."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from domain.text import one_line

if TYPE_CHECKING:
    from config import Settings
    from storage.selection import StateFields

Sender = Literal["customer", "agent", "unknown"]
Shape = Literal["tweets", "messages", "query"]

PROCESSOR_VERSION = "1.0.0"
_STUDENT = re.compile(r"student-[0-9a-f]{12}")

Message = dict[str, str]  # a chat message: role and content

BASELINE_MODEL = "baseline-vader-1"
EMBEDDING_MODEL = "embedded-minilm-1"
BUILT_IN_MODELS = (BASELINE_MODEL, EMBEDDING_MODEL)
"""The values of ``model_used`` in results of the built-in classifiers. Any language model replaces such results."""


def chat_messages(system_prompt: str, transcript: str) -> list[Message]:
    """Return *system_prompt* and *transcript*, which may be truncated, as a system message and a user message."""
    return [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": f"<conversation>\n{transcript}\n</conversation>"},
    ]


# The fields of a source document that the aggregator uses. Those that nobody uses, such as attachments, are not read.
SOURCE_FIELDS = ("tweets", "messages", "text", "conversation_number")
# The times of a document, at its top level or in its metadata; the first readable one counts.
DOCUMENT_TIMES = ("created_at", "createdAt", "timestamp", "date", "time")
MAX_METADATA_CHARACTERS = 100  # a longer value is text
MAX_METADATA_VALUES = 20  # of one field


def source_paths(states: StateFields, metadata: Iterable[str]) -> dict[str, int]:
    """Return the projection of what a run reads of a source document; *metadata* are the fields that results copy."""
    facts = dict.fromkeys((*DOCUMENT_TIMES, *metadata))
    return dict.fromkeys((*SOURCE_FIELDS, *states.names, *facts, *(f"metadata.{name}" for name in facts)), 1)


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
    *created_at* is the time of the document itself, aware; None if the first turn with a time has a usable one, or the document
    has none that can be read.
    """

    shape: Shape
    conversation_number: str | None
    turns: tuple[Turn, ...]
    turns_total: int
    is_ordered: bool = True
    created_at: datetime | None = None

    @cached_property
    def transcript(self) -> str:
        """The turns with their speakers, in order."""
        return "\n".join([turn.line for turn in self.turns])

    @cached_property
    def transcript_sha256(self) -> str:
        """The SHA-256 of the whole ``transcript`` (speakers, texts, their order), before truncation: 64 hex digits."""
        return hashlib.sha256(self.transcript.encode()).hexdigest()

    @property
    def customer_texts(self) -> list[str]:
        """The texts of the customer's turns, in order."""
        return [turn.text for turn in self.turns if turn.sender == "customer"]


@dataclass(frozen=True, slots=True)
class ConversationFacts:
    """The facts about a conversation in its result, beside the labels; no text.

    *started_at* and *last_message_at* (UTC) come from the turns, else from the document; None without a readable time.
    *turns* counts those with text. *metadata* holds short values of the document by the names of its fields.
    """

    started_at: datetime | None
    last_message_at: datetime | None
    turns: int
    channel: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any], conversation: Conversation, fields: Iterable[str]) -> ConversationFacts:
        """Return the facts of *conversation*, which comes from *document*; *fields* are the metadata to copy."""
        given = [at for turn in conversation.turns if (at := turn.at)]
        times = [utc for at in given if (utc := at if at.tzinfo is UTC else _in_utc(at))]
        if not times and (at := conversation.created_at) and (utc := _in_utc(at)):
            times = [utc]
        copied = {name: value for name in fields if (value := _metadata_value(document, name)) is not None}
        channel = copied.pop("channel", None)
        return cls(
            min(times, default=None),
            max(times, default=None),
            len(conversation.turns),
            channel if isinstance(channel, str) else None,
            copied,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as results store them; what is not known is left out."""
        facts: dict[str, Any] = {}
        if self.started_at is not None:
            facts |= {"started_at": self.started_at, "last_message_at": self.last_message_at}
        facts["turns"] = self.turns
        if self.channel is not None:
            facts["channel"] = self.channel
        if self.metadata:
            facts["metadata"] = dict(self.metadata)
        return facts


def _in_utc(at: datetime) -> datetime | None:
    try:
        return at.astimezone(UTC)
    except OverflowError:  # the first and the last day of the calendar
        return None


def _metadata_value(document: Mapping[str, Any], name: str) -> Any:
    """Return the value of the field *name*, at the top level or in the metadata; None if it is missing, or text."""
    for fields in (document, document.get("metadata")):
        if (value := fields.get(name) if isinstance(fields, dict) else None) is None:
            continue
        if isinstance(value, list):
            kept = [short for one in value[:MAX_METADATA_VALUES] if (short := _short_value(one)) is not None]
            if kept:
                return kept
        elif (short := _short_value(value)) is not None:
            return short
    return None


def _short_value(value: Any) -> Any:
    if isinstance(value, str):
        return one_line(value, len(value)) or None if len(value) <= MAX_METADATA_CHARACTERS else None
    return value if isinstance(value, bool | int | float | datetime) else None


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


def student_plan(plan: str, student: str) -> str:
    """Return the plan of a *student* (its ``model_used``) that imitates the answers of *plan*."""
    return f"{plan}:{student}"


def is_student(model_used: object) -> TypeGuard[str]:
    """Return whether *model_used* names a student, not a model of the server."""
    return isinstance(model_used, str) and bool(_STUDENT.fullmatch(model_used))


@dataclass(frozen=True, slots=True)
class ResultOptions:
    """The parts of results beside the labels.

    *keep_original* adds a copy of the document. With *review_below* (0 to 1), a result with confidence says whether one
    of its labels is below that. *metadata* names the fields of the document to copy; see ConversationFacts.
    """

    keep_original: bool = False
    review_below: float | None = None
    metadata: tuple[str, ...] = ("channel",)

    @classmethod
    def of(cls, settings: Settings) -> ResultOptions:
        """Return the options in *settings*."""
        return cls(settings.store_original_conversation, settings.review_below, settings.result_metadata)


def build_result(
    document: Mapping[str, Any], conversation: Conversation, outcome: Outcome, job_id: str, options: ResultOptions
) -> dict[str, Any]:
    """Return the result of *document*, without an ``_id``."""
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "conversation_number": conversation.conversation_number,
        "source_conversation_id": document.get("_id"),
    }
    if conversation.shape == "query":
        result["query_id"] = document.get("_id")
    result["conversation"] = ConversationFacts.of(document, conversation, options.metadata).as_dict()
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
    if is_student(outcome.model_used):
        result["processing_metadata"]["label_source"] = "student"
    if outcome.plan:
        result["processing_metadata"]["plan"] = outcome.plan
    if not conversation.is_ordered:
        result["processing_metadata"]["turn_order"] = "listed"
    if outcome.confidence is not None:
        result["processing_metadata"]["confidence"] = outcome.confidence
        if options.review_below is not None:
            result["processing_metadata"]["needs_review"] = min(outcome.confidence.values()) < options.review_below
    for origin in outcome.copied_from:
        result["processing_metadata"]["copied_from"] = origin
    result["created_at"] = now
    if options.keep_original:
        result["original_conversation"] = dict(document)
    return result
