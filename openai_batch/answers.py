"""From a document to its request, and from the lines of a batch to changes of the documents."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import orjson

from error_handler import JobProcessingError, StateDirectoryError
from openai_batch.batch_protocol import Line, parse_line
from openai_batch.job_config import Document
from openai_batch.job_store import Ending, JobStore
from openai_batch.ledger import Item, ItemState, Ledger, Shard
from storage.extended_json import id_text, loads

logger = logging.getLogger(__name__)

LINES_AT_ONCE = 200
MAX_LINE_BYTES = 16_000_000  # a longer one fits in no document

# How the items end that are in neither file, by the status of the batch. The rest is missing.
_UNTOLD = {"expired": ItemState.EXPIRED, "cancelled": ItemState.CANCELLED, "never_sent": ItemState.CANCELLED}
# Batches that were never run, and what their items are noted with.
_NOT_RUN = {"token_limit": "token_limit_exceeded", "never_sent": "never_sent"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable line, the document as it is now, and how often it was sent (from 1)."""

    document: Document
    line: Line
    attempt: int


class Handling(Protocol):
    """What a job does with its documents; ``documents.py`` has the one for templates, ``triad.py`` that for labels."""

    def request(self, document: Document) -> dict[str, Any]:
        """Return the body of the request for *document*; raise JobProcessingError where there is none."""
        ...

    async def deliver(
        self, answers: Sequence[Answer], batch_id: str, /
    ) -> list[Mapping[str, Any] | JobProcessingError]:
        """Return, for each of *answers*, the update of its document, or why there is none."""
        ...


class Answers:
    """Makes the requests of a job and applies its answers. *max_attempts* counts the first sending."""

    def __init__(self, handling: Handling, store: JobStore, ledger: Ledger, max_attempts: int) -> None:
        self.request: Callable[[Document], dict[str, Any]] = handling.request
        self._deliver: Callable[[Sequence[Answer], str], Awaitable[list[Mapping[str, Any] | JobProcessingError]]] = (
            handling.deliver
        )
        self._store = store
        self._ledger = ledger
        self._max_attempts = max_attempts

    async def apply(
        self,
        shard: Shard,
        paths: Sequence[Path],
        bad: Set[str],
        stop: asyncio.Event,
        on_progress: Callable[[str], None],
    ) -> bool:
        """Bring the documents of *shard* up to the lines in *paths*; *bad* are the custom ids it was refused for.

        Safe to repeat. Documents are changed before the ledger says so. Returns whether all is done and no item of
        the shard SUBMITTED any more; not where *stop* was set meanwhile.
        """
        done = 0
        for path in paths:
            lines = _lines(path)
            while chunk := list(islice(lines, LINES_AT_ONCE)):
                if stop.is_set():
                    return False
                await self._apply_lines(shard, chunk)
                done += len(chunk)
                on_progress(f"shard {shard.number}: {done} of {shard.lines} answers applied")
        untold = self._ledger.items(shard.number, ItemState.SUBMITTED)
        while rest := list(islice(untold, LINES_AT_ONCE)):
            if stop.is_set():
                return False
            await self._end_untold(shard, rest, bad)
        return True

    async def _apply_lines(self, shard: Shard, lines: list[Line]) -> None:
        wanted = self._wanted(shard, lines)
        documents = await self._store.read([item.document_id for item, _ in wanted])
        present = [
            (item, line) for item, line in wanted if line.state is ItemState.OK and item.document_id in documents
        ]
        updates = await self._deliver(
            [Answer(documents[item.document_id], line, item.attempt) for item, line in present], shard.batch_id or ""
        )
        ends: list[tuple[Item, Line, Ending]] = []
        for (item, line), update in zip(present, updates, strict=True):
            if isinstance(update, JobProcessingError):
                problem = Line(
                    line.custom_id, ItemState.FAILED, code="unusable_answer", is_retryable=not update.is_final
                )
                ends.append((item, problem, self._failure(shard, item, problem, str(update))))
            else:
                ends.append((item, line, self._success(shard, item, line, update)))
        for item, line in wanted:
            if line.state is not ItemState.OK:
                ends.append((item, line, self._failure(shard, item, line, _sentence(line))))
        await self._end(ends)
        gone = [item for item, line in wanted if line.state is ItemState.OK and item.document_id not in documents]
        self._ledger.settle(replace(item, state=ItemState.FAILED, code="document_gone") for item in gone)

    async def _end(self, ends: Sequence[tuple[Item, Line, Ending]]) -> None:
        """Write the ends of the documents, and then of their items: in this order a crash in between loses nothing."""
        rejected = await self._store.end([ending for _, _, ending in ends])
        self._ledger.settle(
            replace(item, state=ItemState.FAILED, code="not_stored", retryable=False)
            if item.custom_id in rejected
            else replace(
                item, state=line.state, code=line.code, retryable=ending.update is None and not ending.is_final
            )
            for item, line, ending in ends
        )

    def _wanted(self, shard: Shard, lines: list[Line]) -> list[tuple[Item, Line]]:
        """Return the lines that tell something new, each with its item; of several for one item a usable one."""
        known = self._ledger.find([line.custom_id for line in lines], shard.number)
        wanted: dict[str, tuple[Item, Line]] = {}
        for line in lines:
            item = known.get(line.custom_id)
            if item is None:
                logger.warning("shard %d: a line with an id that was not sent is left out", shard.number)
            elif item.state is ItemState.SUBMITTED:
                before = wanted.get(line.custom_id)
                if before is None or (before[1].state is not ItemState.OK and line.state is ItemState.OK):
                    wanted[line.custom_id] = (item, line)
        return list(wanted.values())

    async def _end_untold(self, shard: Shard, items: list[Item], bad: Set[str]) -> None:
        """End items that no line speaks of, as the status of their batch says."""
        state = _UNTOLD.get(shard.status or "", ItemState.MISSING)
        code, retryable = _NOT_RUN.get(shard.status or "", state.value), True
        if shard.status == "failed":
            # Where the API names lines, the others are fit to be sent again: none of them ran.
            state, code, retryable = ItemState.FAILED, shard.problem or "batch_failed", bool(bad)
        lines = [
            Line(item.custom_id, state, code=code, is_retryable=retryable and item.custom_id not in bad)
            for item in items
        ]
        await self._end(
            [
                (item, line, self._failure(shard, item, line, _sentence(line)))
                for item, line in zip(items, lines, strict=True)
            ]
        )

    def _success(self, shard: Shard, item: Item, line: Line, update: Mapping[str, Any]) -> Ending:
        info = {
            "batch_id": shard.batch_id,
            "model": line.model,
            "prompt_tokens": line.prompt_tokens,
            "reply_tokens": line.reply_tokens,
            "completed_at": datetime.now(UTC),
        }
        return Ending(item.document_id, item.custom_id, update, is_final=False, info=info)

    def _failure(self, shard: Shard, item: Item, line: Line, error: str) -> Ending:
        exhausted = item.attempt >= self._max_attempts and shard.status not in _NOT_RUN
        is_final = not line.is_retryable or exhausted
        logger.warning(
            "document %s %s: %s",
            id_text(loads(item.document_id)),
            "failed" if is_final else "is tried again",
            line.code,
        )
        info: dict[str, Any] = {"batch_id": shard.batch_id, "error": error, "failed_at": datetime.now(UTC)}
        return Ending(item.document_id, item.custom_id, None, is_final, info)


def _sentence(line: Line) -> str:
    """Return what ``processing_info.error`` says; the API's own message may quote the prompt and stays out."""
    meanings = {
        ItemState.EXPIRED: "the batch's time was over before it was run",
        ItemState.CANCELLED: "the batch was cancelled before it was run",
        ItemState.MISSING: "the batch ended without a word about it",
    }
    return meanings.get(line.state, f"OpenAI answered with an error ({line.code})")


def _lines(path: Path, *, is_quiet: bool = False) -> Iterator[Line]:
    """Yield the lines of a downloaded file; what is no line of ours is logged by its number and left out."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                line = parse_line(raw) if raw.strip() else None
                if line is not None:
                    yield line
                elif raw.strip() and not is_quiet:
                    logger.warning("%s:%d is no line of an answer", path.name, number)
    except OSError as exc:
        raise StateDirectoryError(f"{path} cannot be read ({exc.strerror}); fix the rights, then run again.") from exc


def count_lines(path: Path) -> int:
    """Return how many lines of answers *path* holds; a broken one counts none."""
    return sum(1 for _ in _lines(path, is_quiet=True))


def ids_at(path: Path, numbers: str) -> frozenset[str]:
    """Return the custom ids of the lines *numbers* (from 1, joined by commas) of the request file *path*.

    None where the file is gone: then nobody knows which lines they were.
    """
    wanted = {int(number) for number in numbers.split(",") if number}
    if not wanted or not path.is_file():
        return frozenset()
    found = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number in wanted:
                found.add(str(orjson.loads(raw)["custom_id"]))
    return frozenset(found)
