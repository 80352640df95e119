"""What a conversation becomes: the labels, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
