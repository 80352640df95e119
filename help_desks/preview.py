"""How a document will look to the model, for people: the preview of an import. It shows texts of conversations."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from aggregator import aggregate_conversation
from domain.text import counted, escaped, one_line
from error_handler import SkippedDocumentError
from storage.extended_json import Document, id_text

TURNS, CHARACTERS = 6, 140


def preview_lines(document: Document) -> list[str]:
    """Return a few lines about *document*: id, top-level fields, the first turns with their speakers, metadata."""
    lines = [f"  {id_text(document['_id'])}" if "_id" in document else "  (without _id)"]
    for name in ("conversation_number", "channel", "subject", "created_at"):
        if name in document:
            lines.append(f"    {name}: {_short(document[name])}")
    try:
        conversation = aggregate_conversation(document)
    except SkippedDocumentError as exc:
        lines.append(f"    a run skips it: {exc}")
    else:
        for turn in conversation.turns[:TURNS]:
            at = f"{turn.at:%Y-%m-%d %H:%M}  " if turn.at else ""
            lines.append(f"    {at}{_short(turn.line)}")
        if len(conversation.turns) > TURNS:
            lines.append(f"    ... {counted(len(conversation.turns) - TURNS, 'more turn')}")
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and metadata:
        shown = ", ".join(
            f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}" for name, value in metadata.items()
        )
        lines.append(f"    metadata: {_short(shown)}")
    return lines


def _short(value: Any) -> str:
    text = f"{value:%Y-%m-%d %H:%M:%S%z}" if isinstance(value, datetime) else str(value)
    return escaped(one_line(text, CHARACTERS))
