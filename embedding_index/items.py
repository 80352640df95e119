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
    """One thing to be found by its *text*.

    *name* is unique within its *kind* and readable by people: a table's name with its schema, a relationship's id, a
    conversation's source id. *metadata* comes back with each hit; it may be kept in clear on disk, so it holds no text
    of customers.
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
    """What made a vector. Vectors of different identities must never be compared.

    *dimensions* is the length of the vectors; None until the provider's first answer told it.
    """

    provider: str
    model: str
    dimensions: int | None = None

    def __str__(self) -> str:
        size = f", {self.dimensions} dimensions" if self.dimensions else ""
        return f"{self.model} of {self.provider}{size}"

    def is_same_model(self, other: ModelIdentity) -> bool:
        """Whether both can stand in one index; a length that is not known yet fits any."""
        sizes = {self.dimensions, other.dimensions} - {None}
        return (self.provider, self.model) == (other.provider, other.model) and len(sizes) <= 1


@dataclass(frozen=True, slots=True)
class Hit:
    """One found item. *similarity* is the cosine, -1 to 1; *text* is None for conversations, whose text is not kept."""

    kind: Kind
    name: str
    similarity: float
    metadata: Mapping[str, MetadataValue]
    text: str | None = None


class State(StrEnum):
    """PENDING: not in the index, or with an older text. FAILED: so too, and why is known; pending when offered again."""

    PENDING = "pending"
    INDEXED = "indexed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Offered:
    """What is to be done for the items of one offer, in their order.

    *pending* are to be embedded and indexed; *changed* are indexed, and only their metadata there is older: they are
    offered as changed until ``mark_indexed``.
    """

    pending: list[IndexItem]
    changed: list[IndexItem]


@dataclass(frozen=True, slots=True)
class Synchronized:
    """What is to be done after the database was read; *removed* are names that are no longer in it, by kind."""

    pending: list[IndexItem]
    changed: list[IndexItem]
    removed: dict[Kind, list[str]]


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item as it is known here. *text* is None where it is not kept; *attempts* counts since its text is this."""

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
