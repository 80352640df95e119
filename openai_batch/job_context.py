"""The shared context of the steps of one job: its parts, its waits and its counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from openai_batch.job_config import AppConfig
from openai_batch.job_store import JobStore
from openai_batch.ledger import Ledger
from openai_batch.openai_client import NotNowError, OpenAIFiles


@dataclass(slots=True)
class JobResult:
    """The outcome of one call of a job; *retried* documents became pending again meanwhile."""

    succeeded: int = 0
    failed: int = 0
    skipped: int = 0
    retried: int = 0
    batches: int = 0

    @property
    def total_processed(self) -> int:
        """The documents that ended."""
        return self.succeeded + self.failed + self.skipped


@dataclass(frozen=True, slots=True)
class Times:
    """The waits of a run in seconds; tests shorten them. *poll_s* 0 means ``BatchConfig.poll_interval``."""

    poll_s: float = 0.0
    adopt_wait_s: float = 60.0  # how long a new batch may be missing from the list of batches
    token_wait_s: float = 120.0  # before a batch over the enqueued-token limit is created again; doubled each time
    files_late_s: float = 600.0  # how long an ended batch, or one of its files, may be missing
    unreachable_limit_s: float = 3600.0
    rate_wait_s: float = 20.0  # after a 429 without Retry-After

    def wait_s(self, problem: Exception) -> float:
        """Return how long the server asks to wait after *problem*; 0 if it asks for no wait."""
        if not isinstance(problem, NotNowError):
            return 0.0
        return self.rate_wait_s if problem.wait_s is None else problem.wait_s


@dataclass(frozen=True, slots=True)
class JobContext:
    """The open parts of one job. The caller holds the lock of *folder*, which has the ledger and the JSONL files.

    Once *stop* is set no step begins anything new. *on_progress* gets texts such as ``shard 3: in_progress``. The
    steps count in *result*.
    """

    config: AppConfig
    job_id: str
    folder: Path
    store: JobStore
    ledger: Ledger
    files: OpenAIFiles
    times: Times
    stop: asyncio.Event
    on_progress: Callable[[str], None]
    result: JobResult = field(default_factory=JobResult)
