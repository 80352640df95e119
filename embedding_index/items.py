"""Values of the index: items, their states, models, hits. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MetadataValue = str | int | float | bool


class Kind(StrEnum):
    """What an item documents; the value is the prefix of its id."""

    TABLE = "table"
    RELATIONSHIP = "relationship"
    CONVERSATION = "conversation"


@dataclass(frozen=True, slots=True)
class IndexItem:
    """One thing that is found by its *text*.

    *name* is unique within its *kind*: a table's name with its schema, a relationship's id, a conversation's source id.
    *metadata* is returned with each hit. It is stored in clear, so it holds no customer text.
    """

    kind: Kind
    name: str
    text: str
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id in the index: ``table:public.refunds``."""
        return f"{self.kind}:{self.name}"

    @property
    def content_hash(self) -> str:
        """See ``content_hash``."""
        return content_hash(self.text)


def content_hash(text: str) -> str:
    """Return the SHA-256 of *text* as 64 hexadecimal digits: equal texts have one vector."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that made a vector. Vectors of different identities must never be compared.

    *dimensions* is the length of the vectors; None until the provider's first answer.
    """

    provider: str
    model: str
    dimensions: int | None = None

    def __str__(self) -> str:
        size = f", {self.dimensions} dimensions" if self.dimensions else ""
        return f"{self.model} of {self.provider}{size}"

    def is_same_model(self, other: ModelIdentity) -> bool:
        """Whether vectors of both can be compared; an unknown length fits any."""
        sizes = {self.dimensions, other.dimensions} - {None}
        return (self.provider, self.model) == (other.provider, other.model) and len(sizes) <= 1


@dataclass(frozen=True, slots=True)
class Hit:
    """One found item. *similarity* is the cosine, -1 to 1; *text* is None for conversations, whose text is not stored."""

    kind: Kind
    name: str
    similarity: float
    metadata: Mapping[str, MetadataValue]
    text: str | None = None


class State(StrEnum):
    """PENDING: not in the index, or with an older text. FAILED: like pending, with a known reason; offered again, pending."""

    PENDING = "pending"
    INDEXED = "indexed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Offered:
    """What must be done for the items of one offer, in their order.

    *pending* must be embedded and indexed. *changed* are indexed with older metadata; they are returned as changed until
    ``mark_indexed``.
    """

    pending: list[IndexItem]
    changed: list[IndexItem]


@dataclass(frozen=True, slots=True)
class Synchronized:
    """What must be done after the database was read; *removed* are names that it no longer has, by kind."""

    pending: list[IndexItem]
    changed: list[IndexItem]
    removed: dict[Kind, list[str]]


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item of the documentation store. *text* is None if it is not stored; *attempts* counts those with this text."""

    kind: Kind
    name: str
    state: State
    content_hash: str
    metadata: Mapping[str, MetadataValue]
    text: str | None
    attempts: int
    problem: str | None

    @property
    def id(self) -> str:
        """The id in the index; see ``IndexItem``."""
        return f"{self.kind}:{self.name}"
