"""The loop of ``--mode stream``: what is pending, then conversations as they come or grow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from batch_processor import BatchProcessor
from commands.summary import tell_failed
from error_handler import LLMError, LLMUnavailableError, RunInterruptedError, StoreError, StoreUnavailableError
from utils.process import tell_line
from worker.intake import RunOptions

RESTART_S = 1.0  # after an outage

logger = logging.getLogger(__name__)


async def follow(
    processor: BatchProcessor,
    report: Callable[[dict[str, Any]], Awaitable[None]],
    after: RunOptions | None,
    sweep_every_s: float,
) -> int:
    """Label what is pending, then conversations as they come or grow, until ``processor.stop`` is set; begin again after an outage.

    *report* prints the statistics of a run. *after* replaces the options once a pass has ended.

    Raises:
        RunInterruptedError: It was stopped.
    """
    collection, is_first = processor.settings.source_collection, True
    options: RunOptions | None = None
    while not processor.stop.is_set():
        try:
            stats = await processor.run(options)
            if is_first or stats["documents_processed"]:
                await report(stats)
            is_first = False
            if after is not None:
                options, after = after, None
                continue
            if processor.stop.is_set():
                break
            tell_line(f"Waiting for conversations in {collection}; Ctrl-C ends the wait.")
            stats = await processor.follow(sweep_every_s)
            if stats["documents_processed"]:
                await report(stats)
        except (LLMError, StoreError) as exc:
            if not isinstance(exc, StoreUnavailableError | LLMUnavailableError):
                tell_failed(processor.settings.batch_files_dir)
                raise
            logger.warning("interrupted by an outage; going on as soon as it is over: %s", exc)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(processor.stop.wait(), RESTART_S)
    raise RunInterruptedError("Stopped; run the same command again to resume.")
