"""What the documentation store answers: states of items, and what is to be done for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from embedding_index.items import IndexItem, Kind, MetadataValue


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
