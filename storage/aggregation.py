"""Aggregations that read a whole collection, and so need more time than one call of the client has."""

from __future__ import annotations

from typing import Any

from pymongo import timeout

from storage.extended_json import Document


async def aggregated(collection: Any, stages: list[Document], limit_s: float) -> list[Document]:
    """Return what *stages* make of *collection*; *limit_s* replaces the time limit of the client. Errors are the driver's."""
    with timeout(limit_s):
        cursor = await collection.aggregate(stages, allowDiskUse=True)
        return [document async for document in cursor]
