"""From pending documents to complete files: claimed, written, durable, in the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from error_handler import JobProcessingError
from openai_batch.answers import Answers
from openai_batch.job_config import BatchConfig, Document
from openai_batch.job_store import Claim, JobStore
from openai_batch.ledger import Item, Ledger, Shard, ShardState
from openai_batch.shards import UNFINISHED, ShardWriter, custom_id_of, estimated_tokens, request_line, require_room
from storage.extended_json import canonical, id_text

logger = logging.getLogger(__name__)

IDS_AT_ONCE = 500  # of one question to the ledger


class JobPlanner:
    """Makes the shards of one job in *folder*. *token_limit* may be lowered while it works."""

    def __init__(
        self, config: BatchConfig, model: str, store: JobStore, ledger: Ledger, answers: Answers, *, folder: Path
    ) -> None:
        self._config = config
        self._model = model
        self._store = store
        self._ledger = ledger
        self._answers = answers
        self._folder = folder
        self.job_id = ledger.job_id(store.source)
        self.token_limit = config.enqueued_token_limit
        self.refused = self.skipped = 0  # documents that no request could be made of, or that ask for none

    async def recover(self) -> None:
        """Give back the documents that a dead process had taken and not planned; throw its unfinished files away."""
        for unfinished in self._folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink(missing_ok=True)
        async for page in self._store.left_claims(self.job_id):
            known = self._ledger.find([custom_id for _, custom_id in page])
            left = [(document_id, custom_id) for document_id, custom_id in page if custom_id not in known]
            if left:
                logger.info("%d documents of an unfinished file are pending again", len(left))
                await self._store.give_back(left)
            # An answer that was applied to the ledger and not to the document cannot be: documents come first.

    async def plan(self, stop: asyncio.Event, on_progress: Callable[[str], None], limit: int | None = None) -> int:
        """Make shards of the pending documents (at most *limit*) until *stop* is set; return how many documents they hold."""
        writer: ShardWriter | None = None
        items: list[Item] = []
        planned = 0
        try:
            async with contextlib.aclosing(self._store.pages(self._config.batch_size)) as pages:
                async for page in pages:
                    for claim, line, tokens in await self._requests(page if limit is None else page[: limit - planned]):
                        if writer is not None and not writer.has_room(line, tokens):
                            self._finish(writer, items)
                            writer, items = None, []
                        if writer is None:
                            writer = ShardWriter(self._folder, self._shard_limits())
                        writer.add(line, tokens)
                        items.append(Item(claim.custom_id, canonical(claim.document["_id"]), claim.attempt))
                        planned += 1
                    on_progress(f"{planned} documents prepared")
                    if stop.is_set() or (limit is not None and planned >= limit):
                        break
            if writer is not None:
                self._finish(writer, items)
        finally:
            if writer is not None:
                writer.discard()
        return planned

    async def _requests(self, page: list[Document]) -> list[tuple[Claim, bytes, int]]:
        """Return a claimed document, its line and its tokens for each of *page* that a request can be made of."""
        sent: dict[str, tuple[int, int]] = {}
        for start in range(0, len(page), IDS_AT_ONCE):
            chunk = page[start : start + IDS_AT_ONCE]
            sent |= self._ledger.sendings([canonical(document["_id"]) for document in chunk])
        made: list[tuple[Claim, bytes, int]] = []
        for document in page:
            document_id = canonical(document["_id"])
            sendings, attempts = sent.get(document_id, (0, 0))
            claim = Claim(document, custom_id_of(self.job_id, document_id, sendings + 1), attempts + 1)
            try:
                body = self._answers.request(document)
                line, tokens = request_line(claim.custom_id, self._config.endpoint, body), estimated_tokens(body)
                require_room(line, tokens, self._shard_limits())
            except JobProcessingError as exc:
                await self._refuse(document, exc)
                continue
            made.append((claim, line, tokens))
        own = {claim.custom_id for claim in await self._store.claim([claim for claim, _, _ in made], self.job_id)}
        return [entry for entry in made if entry[0].custom_id in own]

    async def _refuse(self, document: Document, problem: JobProcessingError) -> None:
        logger.warning(
            "document %s %s: %s", id_text(document["_id"]), "skipped" if problem.is_skip else "failed", problem
        )
        if await self._store.refuse(document, problem):
            self.skipped += problem.is_skip
            self.refused += not problem.is_skip

    def _shard_limits(self) -> BatchConfig:
        return self._config.model_copy(update={"enqueued_token_limit": self.token_limit})

    def _finish(self, writer: ShardWriter, items: list[Item]) -> None:
        number = self._ledger.next_number()
        file = writer.finish(f"{self.job_id}_{number:05d}_{{sha256}}.jsonl")
        shard = Shard(
            number, self.job_id, ShardState.PLANNED, file.sha256, file.lines, file.bytes, file.tokens, self._model
        )
        self._ledger.plan(shard, items)
        logger.info(
            "shard %d planned: %d lines, %d bytes, about %d tokens", number, file.lines, file.bytes, file.tokens
        )
