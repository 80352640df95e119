"""What a document becomes before it is classified."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

Sender = Literal["customer", "agent", "unknown"]
Shape = Literal["tweets", "messages", "query"]

SPEAKER = {"customer": "Customer", "agent": "Agent", "unknown": "Unknown"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; *at* is aware (UTC offset kept) or None where the document has no readable time."""

    sender: Sender
    text: str
    at: datetime | None = None


@dataclass(frozen=True)
class Conversation:
    """A conversation in the order it was held, with at least one customer turn.

    *turns_total* counts the turns of the document, those without usable text included.
    """

    shape: Shape
    conversation_number: str | None
    turns: tuple[Turn, ...]
    turns_total: int

    @cached_property
    def transcript(self) -> str:
        """The turns, each with who said it.

        Further lines of a turn are indented, so that no text can pass for a turn of its own.
        """
        return "\n".join(f"{SPEAKER[turn.sender]}: {turn.text}".replace("\n", "\n    ") for turn in self.turns)

    @cached_property
    def transcript_sha256(self) -> str:
        """The SHA-256 of ``transcript``, 64 hexadecimal digits: asked for before the model is, and again for the result."""
        return hashlib.sha256(self.transcript.encode()).hexdigest()

    @property
    def customer_texts(self) -> list[str]:
        """The texts of the customer's turns, in order."""
        return [turn.text for turn in self.turns if turn.sender == "customer"]


@dataclass(frozen=True, slots=True)
class Classification:
    """The triad and its one-line categorization; every label is one of the taxonomy's."""

    categorization: str
    intent: str
    topic: str
    sentiment: str

    def as_dict(self) -> dict[str, str]:
        """Return the fields in the order results store them."""
        return {
            "intent": self.intent,
            "topic": self.topic,
            "sentiment": self.sentiment,
            "categorization": self.categorization,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """A classification and how it was made.

    *attempts* counts model calls from 1, repair turns included; *duration_ms* is from the first
    call to the last answer. Token counts and the digest are None where the server does not tell.
    *input_sha256* is of the whole transcript; *fingerprint* covers transcript, prompt, schema, model and options.
    *input_complete* is False where the model saw only *turns_used* of the turns, or a part of one (None: all that have
    text). *confidence* maps intent, topic and sentiment to the probability of the label (0 to 1), None where the server
    gives none. *copied_from* holds the source id of the identical conversation that was asked instead, or nothing.
    """

    classification: Classification
    model_used: str
    model_digest: str | None
    attempts: int
    duration_ms: int
    prompt_tokens: int | None
    reply_tokens: int | None
    input_sha256: str
    fingerprint: str
    input_complete: bool = True
    turns_used: int | None = None
    confidence: dict[str, float] | None = None
    copied_from: tuple[Any, ...] = ()


def input_sha256(conversation: Conversation) -> str:
    """Return the SHA-256 of what the model is shown of *conversation*, 64 hexadecimal digits.

    The whole transcript, before anything is cut: who said what, in order; neither ids nor times.
    """
    return conversation.transcript_sha256


def result_fingerprint(plan: str, input_hash: str) -> str:
    """Return the fingerprint of a result: *plan* is ollama_protocol.plan_fingerprint, *input_hash* of input_sha256."""
    return hashlib.sha256(f"{plan}:{input_hash}".encode()).hexdigest()
