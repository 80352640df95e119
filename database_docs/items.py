"""Items of the embedding index and their states: tables, relationships, conversations. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MetadataValue = str | int | float | bool | list[str]

# The metadata of a conversation beside its labels. No field of a taxonomy has such a name (config.taxonomy).
CONVERSATION_FACTS = ("source_id", "conversation_number", "classified_at", "classified_by")


class Kind(StrEnum):
    """The kind of an item; the value is the prefix of its id."""

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


class State(StrEnum):
    """PENDING: not in the index, or with an older text. FAILED: pending with a known reason; PENDING if offered again."""

    PENDING = "pending"
    INDEXED = "indexed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Offered:
    """The work after items were offered, in their order.

    *pending* must be embedded and indexed. *changed* are indexed with older metadata; they are returned as changed until
    ``DocumentationStore.mark_ended``. *removed* has the names, by kind, that a database no longer has.
    """

    pending: list[IndexItem] = field(default_factory=list)
    changed: list[IndexItem] = field(default_factory=list)
    removed: dict[Kind, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item of the documentation store. *text* is None if it is not stored."""

    kind: Kind
    name: str
    state: State
    content_hash: str
    metadata: Mapping[str, MetadataValue]
    text: str | None
    problem: str | None

    @property
    def id(self) -> str:
        """The id in the index; see ``IndexItem``."""
        return f"{self.kind}:{self.name}"


Item = IndexItem | StoredItem
Ended = Sequence[tuple[IndexItem, str | None]]
"""Items that were indexed, each with None, or with one sentence on why it failed."""
OnEnded = Callable[[Ended], None]
