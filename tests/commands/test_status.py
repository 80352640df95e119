"""``cli.py status``: all workers on one MongoDB."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo import AsyncMongoClient

from error_handler import ExitCode
from storage.heartbeats import mark_died
from tests.worker.site import Site

WORKERS = "sentimental_analysis_workers"


def heartbeat(name: str, silent_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    """Return the document of a worker that wrote it *silent_s* ago."""
    beat_at = datetime.now(UTC) - timedelta(seconds=silent_s)
    return {
        "_id": name,
        "worker": f"worker-{name}",
        "host": f"host-{name}",
        "version": "1.0.0",
        "job_id": f"job_{name}",
        "status": "running",
        "counts": {"processed": 1040, "expected": 2000, "successful": 1030, "failed": 7, "skipped": 3},
        "reasons": {"busy": 2, "timeout": 5},
        "rate": 0.5,
        "eta_s": 1920.0,
        "in_flight": 3,
        "limit": 5,
        "breaker": "closed",
        "started_at": beat_at - timedelta(minutes=5),
        "beat_at": beat_at,
        **fields,
    }


async def mark_all_died(site: Site) -> None:
    """Mark the worker that reports as well, as if it had been silent when it was read."""
    async with AsyncMongoClient[dict[str, Any]](site.uri) as client:
        await mark_died(client[site.database.name][WORKERS], ["a", "b"])


def test_status_shows_running_lost_and_ended_workers(site: Site) -> None:
    """One line that counts them, then each; exit code 1 because one is lost."""
    now = datetime.now(UTC)
    server = {"server": "gpu:1", "state": "away", "problem": "no connection", "answered": 9, "seconds": 0.5}
    servers = [server | {"in_flight": 0, "limit": 4, "is_ready": False}]
    documents = [
        heartbeat("a", servers=servers),
        heartbeat("b", silent_s=90),
        heartbeat("c", status="completed", ended_at=now),
    ]
    site.database[WORKERS].insert_many([*documents, {"_id": "unknown"}])
    ended = site.run("status")
    assert ended.code == ExitCode.INCOMPLETE
    text = ended.out
    assert text.startswith(f"2 workers are running, 1 lost, {site.database.name}.sentimental_analysis\n")
    assert "running     worker-a on host-a: 1,040 of 2,000 documents, 0.5/s, about 32 min left" in text
    assert "1,030 classified, 7 failed, 3 skipped (5 x timeout, 2 x busy); 3 calls in flight, limit 5" in text
    assert "model server answers; for 5 min" in text
    assert "gpu:1: 9 conversations, 0.50 s each, away: no connection; 0 in flight, limit 4\n" in text
    assert "lost        worker-b on host-b: no sign of life for 1 min; 1,030 classified" in text
    assert "last run that ended:\ncompleted   worker-c on host-c: 1,030 classified" in text
    shown = site.run("status", "--json").json["workers"]
    assert {worker["id"]: worker["state"] for worker in shown} == {
        "a": "running",
        "b": "lost",
        "c": "completed",
        "unknown": "running",
    }
    assert datetime.fromisoformat(next(one["beat_at"] for one in shown if one["id"] == "a")).tzinfo


def test_forgotten_worker_is_no_longer_lost(site: Site) -> None:
    """A worker that reports is not ended by it."""
    site.database[WORKERS].insert_many([heartbeat("a"), heartbeat("b", silent_s=90)])
    ended = site.run("status", "--forget-lost")
    assert ended.code == ExitCode.DONE
    assert "died        worker-b on host-b" in ended.out
    asyncio.run(mark_all_died(site))
    again = site.run("status", "--json")
    assert again.code == ExitCode.DONE
    assert {worker["id"]: worker["state"] for worker in again.json["workers"]} == {"a": "running", "b": "died"}


def test_status_without_workers(site: Site) -> None:
    ended = site.run("status")
    assert (ended.code, ended.err) == (ExitCode.DONE, "")
    assert ended.out == f"0 workers are running, 0 lost, {site.database.name}.sentimental_analysis\n"
