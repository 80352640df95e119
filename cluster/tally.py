"""Reports of the workers of a cluster, and their sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

from config import Settings
from worker.checkpoint import RunStats
from worker.intake import RunOptions


@dataclass(frozen=True, slots=True)
class Job:
    """The job of each worker of a run: the settings of the command, and a directory for the state of workers on each node.

    *code* identifies version and taxonomy; a node with other ones is refused.
    """

    settings: Settings
    options: RunOptions
    directory: Path
    code: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a worker; *start* identifies the start of its process, *stats* counts since then."""

    start: str
    node: str
    host: str
    stats: RunStats = field(default_factory=RunStats)
    in_flight: int = 0
    limit: int | None = None
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a worker. *error* is the sentence for the operator, None if the run went to its end or was stopped."""

    snapshot: Snapshot
    in_retry_queue: int = 0
    in_quarantine: int = 0
    interrupted: bool = False
    held_back_s: float = 0.0
    error: str | None = None
    exit_code: int = 0


def added(all_stats: Iterable[RunStats]) -> RunStats:
    """Return the sums of *all_stats*. The total is the largest one, because each worker counts all pending documents.

    *leased_elsewhere* is left at 0: what one worker of the run leases is leased elsewhere for the others.
    """
    found = list(all_stats)
    sums = {name: reduce(_sum, (getattr(one, name) for one in found)) for name in _NAMES} if found else {}
    return replace(RunStats(**sums), total=max((one.total for one in found), default=0), leased_elsewhere=0)


_NAMES = [one.name for one in fields(RunStats)]


def _sum(one: Any, other: Any) -> Any:
    if not isinstance(one, dict):
        return one + other
    sums = dict(one)
    for name, value in other.items():
        sums[name] = _sum(sums[name], value) if name in sums else value
    return sums
