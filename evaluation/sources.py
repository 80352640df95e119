"""Reads labels from a results collection, or from the JSON report of an earlier ``evaluate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from error_handler import ConfigurationError
from evaluation.values import Labelled, Labels, labelled_of, labels_of
from mongo_client import DocumentStore, call_repeatedly, range_filter
from storage import extended_json
from storage.extended_json import Document, id_key
from utils.retry_utils import RetryPolicy

PAGE = 1000
LABEL_FIELDS = (
    *("source_conversation_id", "conversation_number", "classification"),
    *(f"processing_metadata.{name}" for name in ("confidence", "model_used", "fingerprint", "input_sha256")),
)


class LabelSource(Protocol):
    """Labels of conversations; *name* is for people."""

    name: str

    async def find(self, ids: list[Any], numbers: list[str]) -> list[Labelled]:
        """Return the conversations with one of *ids* or of the conversation numbers *numbers*."""

    def pages(self) -> AsyncIterator[list[Labelled]]:
        """Yield all conversations in pages."""


class Collections:
    """Reads collections of the database of *store* by name; each call is retried as *policy* says."""

    def __init__(self, store: DocumentStore, policy: RetryPolicy) -> None:
        self._database, self._policy = store.database, policy

    async def find(self, name: str, query: Document, fields: Sequence[str], **options: Any) -> list[Document]:
        """Return the *fields* of the documents that *query* finds in the collection *name*; all fields if none are given."""
        collection = self._database[name]
        projection = dict.fromkeys(fields, 1) or None
        return await call_repeatedly(
            f"read {name}", lambda: collection.find(query, projection, **options).to_list(None), self._policy
        )

    async def pages(
        self, name: str, fields: Sequence[str], query: Document | None = None
    ) -> AsyncIterator[list[Document]]:
        """Yield the *fields* of the documents that *query* finds in the collection *name*, in the order of ``_id``."""
        after: list[Any] = []
        while True:
            wanted = {**(query or {}), **range_filter(after, [])}
            page = await self.find(name, wanted, fields, sort=[("_id", 1)], limit=PAGE, hint=[("_id", 1)])
            if not page:
                return
            yield page
            after = [page[-1]["_id"]]

    async def grouped(self, name: str, field: str) -> list[Document]:
        """Return ``{_id: value, n: documents}`` for each value of *field* in the collection *name*."""
        stages: list[Document] = [
            {"$match": {field: {"$exists": True}}},
            {"$group": {"_id": f"${field}", "n": {"$sum": 1}}},
        ]

        async def read() -> list[Document]:
            cursor = await self._database[name].aggregate(stages, allowDiskUse=True)
            return [document async for document in cursor]

        return await call_repeatedly(f"count the labels in {name}", read, self._policy)

    async def conversations(self, name: str, ids: list[Any], numbers: list[str]) -> list[Labelled]:
        """Return the source documents of the collection *name* that *ids* or *numbers* name, without labels."""
        query = either("_id", ids, numbers)
        found = await self.find(name, query, ("conversation_number",)) if query else []
        return [Labelled(one["_id"], _text(one.get("conversation_number")), {}) for one in found]


def _text(number: Any) -> str | None:
    if isinstance(number, float) and number.is_integer():  # the shell of MongoDB stores doubles
        number = int(number)
    return None if number is None else str(number)


def either(id_field: str, ids: list[Any], numbers: list[str]) -> Document:
    """Return the query for documents with one of *ids* or *numbers*, which are texts or numbers; empty for none."""
    parts: list[Document] = [{id_field: {"$in": ids}}] if ids else []
    if numbers:
        as_numbers = [int(number) for number in numbers if number.isdecimal() and len(number) < 19]
        parts.append({"conversation_number": {"$in": [*numbers, *as_numbers]}})
    return {"$or": parts} if parts else {}


class ResultsCollection:
    """The labels in a results collection; *fields* are those of the taxonomy."""

    def __init__(self, collections: Collections, name: str, fields: Sequence[str]) -> None:
        self.name = name
        self._collections, self._fields = collections, fields

    async def find(self, ids: list[Any], numbers: list[str]) -> list[Labelled]:
        """Return the conversations with one of *ids* or *numbers*."""
        query = either("source_conversation_id", ids, numbers)
        found = await self._collections.find(self.name, query, LABEL_FIELDS) if query else []
        return [labelled_of(result, self._fields) for result in found]

    async def pages(self) -> AsyncIterator[list[Labelled]]:
        """Yield all conversations in pages, in the order of the ids of the results."""
        async for page in self._collections.pages(self.name, LABEL_FIELDS):
            yield [labelled_of(result, self._fields) for result in page]

    async def counts(self, field: str) -> Counter[Labels]:
        """Return how many results have each combination of labels of *field*."""
        counts: Counter[Labels] = Counter()
        for group in await self._collections.grouped(self.name, f"classification.{field}"):
            labels = labels_of(group["_id"])
            if labels is not None:
                counts[labels] += group["n"]
        return counts


class ReportFile:
    """The labels, and the gold labels, in a report that ``evaluate --output`` has written."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        """Read *path*; raise ConfigurationError if it is no such report."""
        self.name = str(path)
        self.gold: dict[bytes, Mapping[str, Labels]] = {}
        self._labelled: dict[bytes, Labelled] = {}
        try:
            entries = extended_json.loads(path.read_bytes())["conversations"]
            for entry in entries:
                labelled = Labelled(
                    entry["_id"],
                    entry["conversation_number"],
                    _fields(entry["labels"], fields),
                    entry["confidence"],
                    entry["model"],
                    entry["fingerprint"],
                )
                self._labelled[labelled.key] = labelled
                self.gold[labelled.key] = _fields(entry["gold"], fields)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise ConfigurationError(
                f"{path} is not a report of evaluate; write one with python cli.py evaluate --output FILE.json."
            ) from exc

    async def find(self, ids: list[Any], numbers: list[str]) -> list[Labelled]:
        """Return the conversations with one of *ids* or *numbers*."""
        keys, wanted = set(map(id_key, ids)), set(numbers)
        return [one for key, one in self._labelled.items() if key in keys or (one.number or "") in wanted]

    async def pages(self) -> AsyncIterator[list[Labelled]]:
        """Yield all conversations in one page."""
        yield list(self._labelled.values())


def report_file(name: str, fields: Sequence[str]) -> ReportFile | None:
    """Return the report in the file *name*; None if there is no such file."""
    path = Path(name)
    return ReportFile(path, fields) if path.is_file() else None


def _fields(labels: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Labels]:
    found = {name: labels_of(value) for name, value in labels.items() if name in fields}
    return {name: value for name, value in found.items() if value is not None}
