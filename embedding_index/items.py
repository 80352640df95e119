"""What goes into the index: items, their identity, and whether their text changed. Pure: no I/O."""

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
