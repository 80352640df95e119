"""Decides which documents are new, changed, stale or failed, from the document, its result and the plan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from domain.conversation import Conversation, result_fingerprint
from error_handler import SkippedDocumentError
from storage.contract import Document
from storage.extended_json import id_key

Kind = Literal["new", "changed", "stale", "failed", "skipped", "done", "unjudged", "foreign"]
Only = Literal["new", "changed", "stale", "failed"]

SELECTABLE: tuple[Only, ...] = ("new", "changed", "stale", "failed")
REPLACED: tuple[Only, ...] = ("changed", "stale")  # a run replaces the results of these


@dataclass(frozen=True, slots=True)
class ResultProvenance:
    """The hashes stored with a result; None if not recorded, as in results of earlier versions."""

    input_sha256: str | None
    fingerprint: str | None

    @classmethod
    def of(cls, result: Document) -> ResultProvenance:
        """Return the provenance that the stored *result* records."""
        metadata = result.get("processing_metadata")
        fields = metadata if isinstance(metadata, dict) else {}
        return cls(fields.get("input_sha256"), fields.get("fingerprint"))


@dataclass(frozen=True, slots=True)
class StalenessChecker:
    """Decides what each document needs.

    *plan* is the plan_fingerprint of a run now; None if the model server was not asked. *provenance* returns, by
    ``id_key``, how the results of the given ids were made. *queued* returns the ``id_key`` of each document in the
    retry queue or in quarantine.
    """

    aggregate: Callable[[Document], Conversation]
    plan: str | None
    provenance: Callable[[list[Any]], Awaitable[dict[bytes, ResultProvenance]]]
    queued: Callable[[], set[bytes]] = set

    async def of(self, documents: list[Document], queued: set[bytes]) -> list[tuple[Document, Kind]]:
        """Return each of *documents* with its kind; *queued* are the keys of those in the local failure files."""
        made = await self.provenance([document["_id"] for document in documents])
        keyed = [(id_key(document["_id"]), document) for document in documents]
        return [(document, self.kind(document, made.get(key), is_queued=key in queued)) for key, document in keyed]

    async def settled(self, documents: list[Document], only: Only) -> set[bytes]:
        """Return the ``id_key`` of those *documents* that have a result and are not of the kind *only*.

        Failures do not count: whether a document failed says nothing about its result.
        """
        made = await self.provenance([document["_id"] for document in documents])
        keyed = [(id_key(document["_id"]), document) for document in documents]
        return {key for key, document in keyed if key in made and self._fits(document, made[key]) != only}

    def kind(self, document: Document, made: ResultProvenance | None, *, is_queued: bool = False) -> Kind:
        """Return what *document* needs; *made* is the provenance of its result, None if it has none."""
        state = _state(document)
        if state == "foreign":
            return "foreign"
        fit = "new" if made is None else self._fits(document, made)
        if fit in ("done", "skipped"):
            return fit
        if is_queued or state == "failed":
            return "failed"
        return "skipped" if made is None and state == "skipped" else fit

    def _fits(self, document: Document, made: ResultProvenance) -> Kind:
        """Compare *made* with the current *document*: done, changed, stale, unjudged, or skipped (nothing to classify)."""
        try:
            input_hash = self.aggregate(document).transcript_sha256
        except SkippedDocumentError:
            return "skipped"
        if made.input_sha256 is not None and made.input_sha256 != input_hash:
            return "changed"
        if self.plan is None:
            return "unjudged"
        return "done" if made.fingerprint == result_fingerprint(self.plan, input_hash) else "stale"


def _state(document: Document) -> str:
    """Return open, failed, skipped or foreign, from the status or from the two fields of a single query."""
    status = document.get("status")
    if status is None and document.get("status_reason") is not None:
        status = "skipped" if document.get("processed") is True else "failed"
    if status in ("failed", "skipped"):
        return str(status)
    return "open" if status in (None, "pending", "processing", "processed") else "foreign"
