"""What a conversation becomes: the labels, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass


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
    *input_sha256* is of the transcript; *fingerprint* covers transcript, prompt, schema, model and options.
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
