"""Applies the lines of a batch to the documents and to the ledger. Safe to repeat at any point."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from domain.server_reason import server_reason
from error_handler import JobProcessingError, JobValidationError
from model_server.refusals import refused_options
from openai_batch.batch_protocol import Line, parse_line, texts_of
from openai_batch.job_config import Document, value_at
from openai_batch.job_context import JobContext
from openai_batch.job_store import Answer, Ending
from openai_batch.ledger import CANCELLED_HERE, NOT_RUN, Item, ItemState, Shard
from storage.extended_json import id_text, loads
from storage.files import explained

logger = logging.getLogger(__name__)

LINES_AT_ONCE = 200
MAX_LINE_BYTES = 16_000_000  # a longer line fits in no document

# The outcome of items without a line, by the status of their batch; for any other status they are missing.
_WITHOUT_LINE = {"expired": ItemState.EXPIRED, "cancelled": ItemState.CANCELLED, "never_sent": ItemState.CANCELLED}
# The text of ``processing_info.error``. The API's own messages add nothing.
_ERRORS = {
    ItemState.EXPIRED: "the batch expired before this request ran",
    ItemState.CANCELLED: "the batch was cancelled before this request ran",
    ItemState.MISSING: "the batch ended without a result for this request",
}


class Answers:
    """Applies the answers of one job."""

    def __init__(self, context: JobContext) -> None:
        self._context = context

    async def apply(self, shard: Shard, paths: Sequence[Path]) -> bool:
        """Apply the lines in *paths* to the documents of *shard*, and end its other documents.

        Documents are updated before the ledger. Returns whether every item of the shard has ended; False if the
        run is stopped meanwhile.
        """
        stop, applied = self._context.stop, 0
        bad_ids = await asyncio.to_thread(_ids_at, self._context.folder / shard.file_name, shard.bad_lines)
        for path in paths:
            lines = _lines(path)
            while chunk := list(islice(lines, LINES_AT_ONCE)):
                if stop.is_set():
                    return False
                await self._apply_lines(shard, chunk)
                applied += len(chunk)
                self._context.on_progress(f"shard {shard.number}: {applied} of {shard.lines} answers applied")
        rest = self._context.ledger.items(shard.number, ItemState.SUBMITTED)
        while items := list(islice(rest, LINES_AT_ONCE)):
            if stop.is_set():
                return False
            await self._end([self._failure(shard, item, _line_for(shard, item, bad_ids)) for item in items])
        return True

    async def _apply_lines(self, shard: Shard, lines: list[Line]) -> None:
        new = self._new_lines(shard, lines)
        self._learn(line for _, line in new)
        usable = [(item, line) for item, line in new if line.state is ItemState.OK]
        if not self._context.config.mask_pii and any(item.is_masked for item, _ in usable):
            raise JobValidationError(
                f"the documents of shard {shard.number} were sent with --mask-pii, and their answers have placeholders: run the "
                "same command with --mask-pii."
            )
        read = [item.document_id for item, line in new if line.state is ItemState.OK or line.message]
        documents = await self._context.store.read(read)
        endings = [
            self._failure(shard, item, line, said=_reason(line, documents.get(item.document_id)))
            for item, line in new
            if line.state is not ItemState.OK
        ]
        claimed = [(item, line) for item, line in usable if self._is_claimed(item, documents.get(item.document_id))]
        answers = [Answer(documents[item.document_id], line, item.attempt) for item, line in claimed]
        updates = await self._context.store.handling.deliver(answers, shard.batch_id or "")
        for (item, line), update in zip(claimed, updates, strict=True):
            info: dict[str, Any] = {"batch_id": shard.batch_id, "model": line.model, "completed_at": datetime.now(UTC)}
            info |= {"prompt_tokens": line.prompt_tokens, "reply_tokens": line.reply_tokens}
            if isinstance(update, JobProcessingError):
                code, is_retryable = "unusable_answer", not update.is_final
                unusable = Line(item.custom_id, ItemState.FAILED, code=code, is_retryable=is_retryable)
                endings.append(self._failure(shard, item, unusable, str(update)))
            else:
                endings.append(Ending(replace(item, state=ItemState.OK), update, info))
        await self._end(endings)
        claimed_ids = {item.custom_id for item, _ in claimed}
        await self._end_lost([item for item, _ in usable if item.custom_id not in claimed_ids], documents)

    async def _end_lost(self, items: Sequence[Item], documents: Mapping[str, Document]) -> None:
        """End *items*, whose answers cannot be stored: their documents are gone, or not claimed for them any more."""
        values, ended, free = self._context.config.schema_config.status, [], []
        for item in items:
            document = documents.get(item.document_id)
            status = value_at(document, values.field_name, None)
            if status != values.in_progress_value:  # otherwise another request is under way
                free.append(item.document_id)
            if document is not None:
                logger.warning(
                    "document %s: the answer is not stored, because another program has changed the status or processing_info",
                    id_text(loads(item.document_id)),
                )
            code = "document_gone" if document is None else "claim_lost"
            is_pending = status == values.pending_value
            ended.append(replace(item, state=ItemState.FAILED, code=code, retryable=is_pending))
        await self._context.store.handling.release(free)
        self._context.ledger.settle(ended)

    def _is_claimed(self, item: Item, document: Document | None) -> bool:
        return document is not None and self._context.store.has_claim(document, item.custom_id)

    def _learn(self, lines: Iterable[Line]) -> None:
        """Make later requests those of a reasoning model if a line was refused as such models do."""
        handling = self._context.store.handling
        if not handling.is_reasoning and any(map(_refuses_options, lines)):
            handling.is_reasoning = True
            logger.warning(
                "the model refuses max_tokens or a temperature, as reasoning models do: requests have max_completion_tokens "
                "and no temperature from now on; if answers are cut off, raise OPENAI_MAX_TOKENS"
            )

    async def _end(self, endings: Sequence[Ending]) -> None:
        """Write the ends to the documents, then to the ledger: in this order a crash in between loses nothing."""
        rejected = await self._context.store.end(endings)
        self._context.ledger.settle(
            replace(ending.item, state=ItemState.FAILED, code="not_stored", retryable=False)
            if ending.item.custom_id in rejected
            else ending.item
            for ending in endings
        )

    def _new_lines(self, shard: Shard, lines: list[Line]) -> list[tuple[Item, Line]]:
        """Return the lines of items that have not ended, one for each item; of several lines a usable one wins."""
        known = self._context.ledger.find([line.custom_id for line in lines])
        new: dict[str, tuple[Item, Line]] = {}
        for line in lines:
            item = known.get(line.custom_id)
            if item is None or item.shard != shard.number:
                logger.warning("shard %d: ignored a line with an unknown custom_id", shard.number)
            elif item.state is ItemState.SUBMITTED:
                first = new.get(line.custom_id)
                if first is None or first[1].state is not ItemState.OK:
                    new[line.custom_id] = (item, line)
        return list(new.values())

    def _failure(self, shard: Shard, item: Item, line: Line, error: str | None = None, said: str = "") -> Ending:
        if line.state is ItemState.CANCELLED and shard.problem == CANCELLED_HERE:
            line = replace(line, code=CANCELLED_HERE)
        is_attempt = shard.status not in NOT_RUN and line.code != CANCELLED_HERE
        is_exhausted = is_attempt and item.attempt >= self._context.config.batch.max_retries
        is_retryable = (line.is_retryable or _refuses_options(line)) and not is_exhausted
        outcome = "is pending again" if is_retryable else "failed"
        logger.warning("document %s %s: %s", id_text(loads(item.document_id)), outcome, f"{line.code}{said}")
        code = shard.problem if shard.status == "failed" and shard.problem else line.code
        error = error or _ERRORS.get(line.state, f"OpenAI answered with an error ({code}){said}")
        info = {"batch_id": shard.batch_id, "error": error, "failed_at": datetime.now(UTC)}
        return Ending(replace(item, state=line.state, code=line.code, retryable=is_retryable), None, info)


def _line_for(shard: Shard, item: Item, bad_ids: Set[str]) -> Line:
    """Return a line for an item that has none in the files, from the status of its batch."""
    is_retryable = item.custom_id not in bad_ids
    if shard.status == "failed":
        # If the API names bad lines, the others can be sent again: none of them ran.
        is_retryable = is_retryable and bool(bad_ids)
        code = (shard.problem or "batch_failed").partition(";")[0]
        return Line(item.custom_id, ItemState.FAILED, code=code, is_retryable=is_retryable)
    state = _WITHOUT_LINE.get(shard.status or "", ItemState.MISSING)
    return Line(item.custom_id, state, code=NOT_RUN.get(shard.status or "", state.value), is_retryable=is_retryable)


def _refuses_options(line: Line) -> bool:
    return line.state is ItemState.FAILED and bool(refused_options(line.message or ""))


def _reason(line: Line, document: Mapping[str, Any] | None) -> str:
    """Return the API's reason for a failed *line*, without what stands in its *document*."""
    if line.state is not ItemState.FAILED or line.message is None or document is None:
        return ""
    return server_reason(orjson.dumps({"message": line.message}), texts_of(document))


def _lines(path: Path, *, is_quiet: bool = False) -> Iterator[Line]:
    """Yield the lines of a downloaded file; log the numbers of malformed ones and skip them."""
    with explained(f"{path} cannot be read"), path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES):
            number += 1
            line = parse_line(raw) if raw.strip() else None
            if line is not None:
                yield line
            elif raw.strip() and not is_quiet:
                logger.warning("%s:%d is not a line of a result file; ignored", path.name, number)


def count_lines(path: Path) -> int:
    """Return the number of well-formed lines of the result file *path*."""
    return sum(1 for _ in _lines(path, is_quiet=True))


def _ids_at(path: Path, numbers: str) -> frozenset[str]:
    """Return the custom ids of the lines *numbers* (from 1, joined by commas) of the request file *path*, if it exists."""
    wanted = {int(number) for number in numbers.split(",") if number}
    if not wanted or not path.is_file():
        return frozenset()
    with path.open("rb") as file:
        return frozenset(str(orjson.loads(raw)["custom_id"]) for number, raw in enumerate(file, 1) if number in wanted)
