"""Aggregations that read a whole collection, and so need more time than one call of the client has."""

from __future__ import annotations

from typing import Any

from pymongo import timeout

from storage.extended_json import Document


async def aggregated(
    collection: Any, stages: list[Document], limit_s: float, hint: str | None = None
) -> list[Document]:
    """Return what *stages* make of *collection*, through the index *hint* if given. Errors are the driver's.

    *limit_s* replaces the time limit of the client.
    """
    options = {} if hint is None else {"hint": hint}
    with timeout(limit_s):
        cursor = await collection.aggregate(stages, allowDiskUse=True, **options)
        return [document async for document in cursor]
