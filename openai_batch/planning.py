"""From pending documents to exactly one batch at OpenAI for each JSONL file.

Documents are rendered, claimed, and written to files that are durable before the ledger names them. Lines are written
as they come, so memory does not grow with the size of a file. A file is uploaded, and its batch created; a batch that
exists already is found.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import orjson

from domain.text import counted
from error_handler import JobConnectionError, JobProcessingError, JobValidationError
from openai_batch.job_config import BatchConfig, Document
from openai_batch.job_context import JobContext
from openai_batch.job_store import Claim
from openai_batch.ledger import MASKED, NOT_SENT, OPEN, Item, ItemState, Shard, ShardState
from openai_batch.openai_client import MAX_WAIT_S, UNFINISHED, NotNowError, NotThereError
from storage.extended_json import canonical, id_text
from storage.files import SPACE, explained, open_private, publish
from storage.mongo_connection import hosts_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

BYTES_PER_TOKEN = 3.0  # a low estimate: English has about 4.5
TOKENS_PER_MESSAGE = 4
# The longest text that one token can stand for: JSON, numbers and ids have few bytes per token.
_PIECE = re.compile(rb"[A-Za-z]{1,7}|[0-9]{1,3}|[!-/:-@\[-`{-~]|[\x80-\xff]{1,3}|\n+| (?=[0-9])")


def custom_id_of(job_id: str, document_id: str, sending: int, *, is_masked: bool) -> str:
    """Return the id of one line: at most 64 ASCII characters, with no text of the document.

    *document_id* is canonical Extended JSON, so that 1 and "1" differ; *sending* makes each line unique.
    """
    digest = hashlib.sha256(document_id.encode()).digest()
    return f"{job_id}:{base64.urlsafe_b64encode(digest)[:22].decode()}:{sending}{MASKED if is_masked else ''}"


def request_line(custom_id: str, endpoint: str, body: Mapping[str, Any]) -> bytes:
    """Return one line, including its line end; raise JobProcessingError if *body* cannot be written as JSON."""
    fields = {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}
    try:
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as exc:
        raise JobProcessingError(
            "the request cannot be written as JSON, for example because of half an emoji", is_final=True
        ) from exc


def estimated_tokens(body: Mapping[str, Any]) -> int:
    """Return an upper estimate of the prompt tokens of *body*."""
    messages = body.get("messages", ())
    texts = [str(message.get("content", "")) for message in messages]
    if body.get("response_format"):
        texts.append(orjson.dumps(body["response_format"]).decode())
    return math.ceil(sum(map(_text_tokens, texts))) + TOKENS_PER_MESSAGE * len(messages)


@functools.lru_cache(maxsize=8)  # system prompt and schema are the same in each request
def _text_tokens(text: str) -> float:
    # Bytes, not characters: other scripts have up to one token per character.
    raw = text.encode(errors="replace")
    return max(len(raw) / BYTES_PER_TOKEN, _PIECE.subn(b"", raw)[1])


def reply_limit(path: Path) -> int | None:
    """Return the answer tokens that each request of the file *path* allows; None if the file cannot be read.

    All requests of a file have the same model and limits.
    """
    try:
        with path.open("rb") as file:
            body = orjson.loads(file.readline())["body"]
        return int(body.get("max_completion_tokens") or body["max_tokens"])
    except (OSError, ValueError, TypeError, LookupError):
        return None


class ShardWriter:
    """Writes one JSONL file: ``add`` while it ``has_room``, then ``finish`` or ``discard``."""

    def __init__(self, folder: Path, config: BatchConfig, token_limit: int | None) -> None:
        """Open a temporary file in *folder* with mode 0600; raise StateDirectoryError if that is impossible."""
        self._folder = folder
        self._config = config
        self._token_limit = token_limit
        self._path = folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        self._digest = hashlib.sha256()
        self._items: list[Item] = []
        self._bytes = self._tokens = 0
        with self._writing():
            self._file = open_private(self._path, buffering=1 << 20)

    def has_room(self, line: bytes, tokens: int) -> bool:
        """Return whether *line* fits; an empty file takes any line."""
        return not self._items or (
            len(self._items) < self._config.max_lines
            and self._bytes + len(line) <= self._config.max_file_bytes
            and (self._token_limit is None or self._tokens + tokens <= self._token_limit)
        )

    def add(self, item: Item, line: bytes, tokens: int) -> None:
        """Append the *line* of *item*; raise StateDirectoryError if the disk is full."""
        with self._writing():
            self._file.write(line)
        self._digest.update(line)
        self._items.append(item)
        self._bytes += len(line)
        self._tokens += tokens

    def finish(self, number: int, job_id: str, model: str) -> tuple[Shard, list[Item]]:
        """Make the file durable under the name of shard *number*; return the shard and its items.

        Raises StateDirectoryError if the disk is full; then there is no such file.
        """
        sha256 = self._digest.hexdigest()
        sizes = (len(self._items), self._bytes, self._tokens)
        shard = Shard(number, job_id, ShardState.PLANNED, sha256, *sizes, model, created_at=time.time())
        with self._writing(), self._file:
            publish(self._file, self._folder / shard.file_name)
        return shard, self._items

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"{self._folder} cannot be written", SPACE)

    def discard(self) -> None:
        """Remove the temporary file; after ``finish`` this does nothing."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class JobSender:
    """Makes the shards of one job and their batches. *token_limit* is lowered when OpenAI names a lower one."""

    def __init__(self, context: JobContext) -> None:
        self._context, self._ledger, self._files = context, context.ledger, context.files
        self._batch = context.config.batch
        self.token_limit = self._batch.enqueued_token_limit
        self._unseen_since: dict[int, float] = {}  # shard -> when the server first reported that it has no such file

    async def recover(self) -> None:
        """Give back the documents that a killed process claimed without finishing their file; remove such files.

        Raises JobValidationError if the collection is not the one that the open batches were made from.
        """
        context = self._context
        is_found = False
        for unfinished in context.folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink(missing_ok=True)
        async for page in context.store.claims_of(context.job_id):
            known = self._ledger.find([custom_id for _, custom_id in page])
            is_found = is_found or bool(known)
            left = [(document_id, custom_id) for document_id, custom_id in page if custom_id not in known]
            if left:
                logger.info("%d documents of an unfinished file are pending again", len(left))
                await context.store.give_back(left)
        is_open = any(any(self._ledger.items(shard.number, ItemState.SUBMITTED)) for shard in self._ledger.shards(OPEN))
        if is_open and not is_found and not await context.store.has_trace_of(context.job_id):
            raise JobValidationError(
                f"this job has open batches, but no document of {context.config.source} at "
                f"{hosts_of(context.config.database.uri.get_secret_value())} was sent by it, so the answers would be lost. Set "
                "MONGODB_URI to the server that the documents were sent from. If they are gone from it, wait until the batches "
                f"have ended at OpenAI, then move {context.folder} away."
            )

    async def plan(self, limit: int | None = None) -> int:
        """Make shards of the pending documents (at most *limit*) until stopped; return the number of documents in them."""
        context = self._context
        writer: ShardWriter | None = None
        planned = 0
        try:
            async with contextlib.aclosing(context.store.pages(self._batch.batch_size)) as pages:
                async for page in pages:
                    for claim in await self._claimed(page if limit is None else page[: limit - planned]):
                        if writer is not None and not writer.has_room(claim.line, claim.tokens):
                            self._finish(writer)
                            writer = None
                        if writer is None:
                            writer = ShardWriter(context.folder, self._batch, self.token_limit)
                        writer.add(claim.item, claim.line, claim.tokens)
                        planned += 1
                    context.on_progress(f"{counted(planned, 'document')} prepared")
                    if context.stop.is_set() or (limit is not None and planned >= limit):
                        break
            if writer is not None:
                self._finish(writer)
        finally:
            if writer is not None:
                writer.discard()
        return planned

    async def _claimed(self, page: list[Document]) -> list[Claim]:
        """Render and claim the documents of *page*; return those that are claimed."""
        context, claims = self._context, []
        ids = [canonical(document["_id"]) for document in page]
        sent = self._ledger.sendings(ids)
        for document_id, document in zip(ids, page, strict=True):
            sendings, attempts = sent.get(document_id, (0, 0))
            custom_id = custom_id_of(context.job_id, document_id, sendings + 1, is_masked=context.config.mask_pii)
            item = Item(custom_id, document_id, attempts + 1)
            try:
                body = context.store.handling.request(document)
                line, tokens = request_line(item.custom_id, self._batch.endpoint, body), estimated_tokens(body)
                self._require_room(line, tokens)
            except JobProcessingError as exc:
                await self._refuse(document, exc)
            else:
                claims.append(Claim(document, item, line, tokens))
        return await context.store.claim(claims, context.job_id)

    def _require_room(self, line: bytes, tokens: int) -> None:
        """Raise JobProcessingError if *line* exceeds a limit even alone in its file."""
        if len(line) > self._batch.max_file_bytes or (self.token_limit is not None and tokens > self.token_limit):
            raise JobProcessingError(
                f"the request has {len(line)} bytes and about {tokens} tokens, more than a batch may hold; shorten the prompt",
                is_final=True,
            )

    async def _refuse(self, document: Document, problem: JobProcessingError) -> None:
        logger.warning(
            "document %s %s: %s", id_text(document["_id"]), "skipped" if problem.is_skip else "failed", problem
        )
        if await self._context.store.refuse(document, problem):
            self._context.result.skipped += problem.is_skip
            self._context.result.failed += not problem.is_skip

    def _finish(self, writer: ShardWriter) -> None:
        context = self._context
        shard, items = writer.finish(self._ledger.next_number(), context.job_id, context.config.openai.model)
        self._ledger.plan(shard, items)
        sizes = (shard.number, shard.lines, shard.bytes, shard.tokens)
        logger.info("shard %d planned: %d lines, %d bytes, about %d tokens", *sizes)

    async def send(self) -> None:
        """Upload and create what is planned and fits in the enqueued-token limit.

        A shard that cannot be sent does not block the others; the first error is raised at the end.
        """
        await for_each(self._ledger.shards(NOT_SENT), self._send)

    async def _send(self, shard: Shard) -> None:
        if self._context.stop.is_set():
            return
        if shard.state is ShardState.CREATING:
            shard = await self.find_batch(shard)
            if shard.state is not ShardState.CREATING:
                return
            logger.info("no batch of shard %d exists", shard.number)
        elif not self._has_room(shard):
            return
        if (reason := await self._reason_to_give_up(shard)) is not None:
            logger.warning(
                "the file of shard %d is not sent, because %s; its documents are pending again", shard.number, reason
            )
            self._ledger.give_up(shard, "never_sent")
            return
        if shard.state is ShardState.PLANNED:
            shard = await self._upload(shard)
        if shard.state is ShardState.UPLOADED:
            shard = self._ledger.advance(shard.number, ShardState.CREATING, problem=None)
        if shard.state is ShardState.CREATING:
            await self._create(shard)

    async def _reason_to_give_up(self, shard: Shard) -> str | None:
        """Return why the file of *shard*, perhaps of an earlier start, must not be sent; None if it may be."""
        items = list(self._ledger.items(shard.number, ItemState.SUBMITTED))
        if self._context.config.mask_pii and any(not item.is_masked for item in items):
            return "it was made without --mask-pii"
        if await self._context.store.count_claims(items) < len(items):  # they are sent, and paid for, in another file
            return "another program has changed the status of documents in it"
        return None

    def _has_room(self, shard: Shard) -> bool:
        if wait_left_s(shard):
            return False
        live, limit = self._ledger.live_tokens(), self.token_limit
        return limit is None or live == 0 or live + shard.tokens <= limit

    async def _upload(self, shard: Shard) -> Shard:
        # A file that was uploaded but not recorded costs nothing, but it holds customer text: reuse it.
        file_id = await self._files.find_file(shard.file_name, shard.created_at)
        if file_id is None:
            path = self._context.folder / shard.file_name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                logger.warning("the file of shard %d is missing or cut; its documents are pending again", shard.number)
                return self._ledger.give_up(shard, "never_sent")
            self._context.on_progress(f"uploading shard {shard.number}, {shard.lines} lines")
            file_id = await self._files.upload(path, shard.file_name)
        return self._ledger.advance(shard.number, ShardState.UPLOADED, file_id=file_id)

    async def _create(self, shard: Shard) -> None:
        """Create the batch of *shard*, which is CREATING: the ledger already records that it may exist."""
        try:
            state = await self._files.create(
                shard.file_id or "", shard.metadata, self._context.folder / shard.file_name
            )
        except (NotThereError, NotNowError) as exc:
            self._put_off(shard, exc)
            return
        except JobValidationError as exc:
            # Refused, so no batch exists. The next start asks again, after the cause has been removed.
            self._ledger.advance(shard.number, ShardState.UPLOADED, problem=str(exc))
            raise
        self._ledger.advance(shard.number, ShardState.CREATED, batch_id=state.batch_id, status=state.status)
        logger.info("batch %s created for shard %d", state.batch_id, shard.number)

    def _put_off(self, shard: Shard, refusal: NotThereError | NotNowError) -> None:
        """Create the batch later: none exists. A file that stays invisible for too long is uploaded again."""
        times = self._context.times
        not_before = time.time() + (times.wait_s(refusal) or min(1.0, times.poll_s))
        if isinstance(refusal, NotThereError):
            since = self._unseen_since.setdefault(shard.number, time.monotonic())
            if time.monotonic() - since > times.adopt_wait_s:
                del self._unseen_since[shard.number]
                logger.warning("OpenAI has lost the file of shard %d; uploading it again", shard.number)
                self._ledger.advance(shard.number, ShardState.PLANNED, file_id=None, not_before=not_before)
                return
        self._ledger.advance(shard.number, ShardState.UPLOADED, problem=str(refusal), not_before=not_before)

    async def find_batch(self, shard: Shard) -> Shard:
        """Look for the batch that *shard*, which is CREATING, may have; return the shard, CREATED if there is one.

        Looks for ``Times.adopt_wait_s``, because lists lag. That time starts now and on the monotonic clock: after a
        crash it is unknown when the create call was made, and whether it arrived late.
        """
        wait_s = self._context.times.adopt_wait_s
        deadline = time.monotonic() + wait_s
        while True:
            state = await self._files.find_batch(shard.metadata, shard.file_id or "")
            if state is not None:
                logger.info("batch %s of shard %d exists already and is used", state.batch_id, shard.number)
                return self._ledger.advance(
                    shard.number, ShardState.CREATED, batch_id=state.batch_id, status=state.status
                )
            if time.monotonic() >= deadline:
                return shard
            self._context.on_progress(f"shard {shard.number}: checking whether its batch exists")
            await asyncio.sleep(max(0.05, wait_s / 12))


async def for_each(values: Iterable[T], step: Callable[[T], Awaitable[Any]]) -> None:
    """Await *step* for each of *values*, even after one failed; then raise the first error, permanent ones first."""
    failures: list[JobConnectionError | JobValidationError] = []
    for value in values:
        try:
            await step(value)
        except (JobConnectionError, JobValidationError) as exc:
            failures.append(exc)
    if failures:
        raise next((failure for failure in failures if isinstance(failure, JobValidationError)), failures[0])


def wait_left_s(shard: Shard) -> float:
    """Return the seconds that *shard* still has to wait; 0 if they exceed MAX_WAIT_S, because the clock was set."""
    left = shard.not_before - time.time()
    return left if 0 < left <= MAX_WAIT_S else 0.0
