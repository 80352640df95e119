"""Decides which documents are new, changed, stale or failed, from the document, its result and the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from aggregator import aggregate_conversation
from domain.conversation import BUILT_IN_MODELS, is_student, result_fingerprint, student_plan
from error_handler import SkippedDocumentError
from mongo_client import DocumentStore
from storage.extended_json import Document, id_key
from worker.quarantine import failed_keys

Only = Literal["new", "changed", "stale", "style", "failed", "elsewhere", "student"]
Kind = Literal[Only, "skipped", "done", "unjudged", "foreign"]

SELECTABLE: tuple[Only, ...] = get_args(Only)
_WITHOUT_RESULT: dict[str, Kind] = {"processed": "elsewhere", "skipped": "skipped"}  # by state; new otherwise
BASELINE_PLAN = "baseline"  # how plans of the built-in classifiers begin
REPLACED: tuple[Only, ...] = ("changed", "stale", "style", "student")  # a run replaces the results of these


@dataclass(frozen=True, slots=True)
class Plan:
    """Model, prompt and options of a run. *named* returns the fingerprint of the same plan with its model under another name.

    Ollama lists one model under several names; the *digest* identifies it, None if it is unknown. *others* are the same
    plan in the other reply styles, *mixed* the plans of the other models if the servers of the run have different ones.
    """

    fingerprint: str
    digest: str | None = None
    named: Callable[[str], str] | None = None
    others: tuple[Plan, ...] = ()
    mixed: tuple[Plan, ...] = ()

    def taught(self, metadata: Document, input_hash: str) -> bool:
        """Return whether a result with *metadata* is of a student that imitates this plan."""
        fingerprint, model = metadata.get("fingerprint"), metadata.get("model_used")
        if not is_student(model):
            return False
        return fingerprint == result_fingerprint(student_plan(self.fingerprint, model), input_hash)

    def made(self, metadata: Document, input_hash: str) -> bool:
        """Return whether a result with *metadata* would come out of this plan, or of a better one, for the same input."""
        fingerprint, model = metadata.get("fingerprint"), metadata.get("model_used")
        if fingerprint == result_fingerprint(self.fingerprint, input_hash):
            return True
        if any(one.made(metadata, input_hash) for one in self.mixed):
            return True
        if self.fingerprint.startswith(BASELINE_PLAN):  # they replace only their own results, with another taxonomy
            return model not in BUILT_IN_MODELS
        if self.digest is None or self.named is None or metadata.get("model_digest") != self.digest:
            return False
        return isinstance(model, str) and fingerprint == result_fingerprint(self.named(model), input_hash)


@dataclass(frozen=True, slots=True)
class StalenessChecker:
    """Decides what each document of *store* needs.

    *directory* holds the retry queue and the quarantine. *plan* is that of a run now; None if the model server was not
    asked.
    """

    store: DocumentStore
    directory: Path
    plan: Plan | None

    def queued(self) -> set[bytes]:
        """Return the ``id_key`` of each document in the retry queue or in quarantine."""
        return failed_keys(self.directory)

    async def of(self, documents: list[Document], queued: set[bytes]) -> list[tuple[Document, Kind]]:
        """Return each of *documents* with its kind; *queued* are the keys of those in the local failure files."""
        made = await self.store.result_provenance([document["_id"] for document in documents])
        keyed = [(id_key(document["_id"]), document) for document in documents]
        return [(document, self._kind(document, made.get(key), is_queued=key in queued)) for key, document in keyed]

    async def settled(self, documents: list[Document], only: Only) -> set[bytes]:
        """Return the ``id_key`` of those *documents* that have a result and are not of the kind *only*.

        Failures do not count: whether a document failed says nothing about its result.
        """
        made = await self.store.result_provenance([document["_id"] for document in documents])
        keyed = [(id_key(document["_id"]), document) for document in documents]
        return {key for key, document in keyed if key in made and self._fits(document, made[key]) != only}

    def _kind(self, document: Document, made: Document | None, *, is_queued: bool) -> Kind:
        """Return what *document* needs; *made* has the provenance of its result, None if it has none."""
        state = self.store.states.state_of(document)
        if state == "foreign":
            return "foreign"
        fit = None if made is None else self._fits(document, made)
        if fit in ("done", "style", "skipped"):
            return fit
        if is_queued or state == "failed":
            return "failed"
        return fit or _WITHOUT_RESULT.get(state, "new")

    def _fits(self, document: Document, made: Document) -> Kind:
        """Compare *made* with the current *document*: done, student, changed, stale, style, unjudged, or skipped (no text)."""
        try:
            input_hash = aggregate_conversation(document).transcript_sha256
        except SkippedDocumentError:
            return "skipped"
        metadata = made.get("processing_metadata")
        fields = metadata if isinstance(metadata, dict) else {}  # earlier versions stored no hashes
        if fields.get("input_sha256") not in (None, input_hash):
            return "changed"
        if self.plan is None:
            return "unjudged"
        if any(one.taught(fields, input_hash) for one in (self.plan, *self.plan.others)):
            return "student"
        if self.plan.made(fields, input_hash):
            return "done"
        return "style" if any(other.made(fields, input_hash) for other in self.plan.others) else "stale"


async def grown_keys(store: DocumentStore, documents: list[Document], done: set[bytes]) -> set[bytes]:
    """Return the ``id_key`` of those *documents* that are *done*, but whose result is of another text than theirs."""
    labelled = [document for document in documents if id_key(document["_id"]) in done]
    if not labelled:
        return set()
    settled = await StalenessChecker(store, Path(), None).settled(labelled, "changed")
    return {id_key(document["_id"]) for document in labelled} - settled
