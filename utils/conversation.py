"""What a document becomes before it is classified."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Literal

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
