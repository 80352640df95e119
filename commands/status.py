"""``cli.py status``: the state of all workers that write this results collection."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from commands.flags import Command
from commands.summary import server_line
from config import Settings
from domain.text import counted
from error_handler import ExitCode
from mongo_client import DocumentStore
from service.runs import duration
from storage.heartbeats import LOST_AFTER_S, heartbeats, mark_died, read_all

SHOWN_ENDED = 5
LEFT_OUT_OF_JSON = ("_id", "orders", "status")
BREAKER = {"open": "model server away, waiting", "closed": "model server answers"}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print all workers that MongoDB has kept, as JSON")
    parser.add_argument(
        "--forget-lost",
        action="store_true",
        help="record that lost workers have died, because nobody will start them again",
    )


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    store = DocumentStore(settings)
    try:
        await store.check()
        collection = heartbeats(store.database, settings.results_collection)
        workers = [_with_state(found) for found in await read_all(collection)]
        if arguments.forget_lost:
            lost = [worker for worker in workers if worker["state"] == "lost"]
            await mark_died(collection, [worker["_id"] for worker in lost])
            for worker in lost:
                worker["state"] = "died"
    finally:
        await store.close()
    print((_as_json if arguments.json else _as_text)(workers, settings))
    return ExitCode.INCOMPLETE if any(worker["state"] == "lost" for worker in workers) else ExitCode.DONE


def _with_state(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the heartbeat *found* with its state: the status that it reports, or lost if it no longer reports."""
    is_silent = found.get("ended_at") is None and (found.get("silent_s") or 0.0) > LOST_AFTER_S
    return {**found, "state": "lost" if is_silent else found.get("status", "running")}


def _as_json(workers: list[dict[str, Any]], settings: Settings) -> str:
    def plain(value: Any) -> str:
        return value.replace(tzinfo=UTC).isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)

    shown = [
        {"id": worker["_id"], **{name: value for name, value in worker.items() if name not in LEFT_OUT_OF_JSON}}
        for worker in workers
    ]
    report = {"results": f"{settings.db_name}.{settings.results_collection}", "workers": shown}
    return json.dumps(report, indent=2, default=plain)


def _as_text(workers: list[dict[str, Any]], settings: Settings) -> str:
    place = f"{settings.db_name}.{settings.results_collection}"
    active = [worker for worker in workers if worker.get("ended_at") is None and worker["state"] != "died"]
    lost = sum(worker["state"] == "lost" for worker in active)
    ended = [worker for worker in workers if worker not in active][:SHOWN_ENDED]
    running = counted(len(active) - lost, "worker is running", "workers are running")
    lines = [f"{running}, {lost} lost, {place}"]
    for worker in active:
        lines += _lost_lines(worker) if worker["state"] == "lost" else _running_lines(worker)
    if ended:
        lines.append("last run that ended:" if len(ended) == 1 else f"last {len(ended)} runs that ended:")
        lines += (_line(worker, f"{_counts(worker)}, ran for {duration(worker.get('ran_s'))}") for worker in ended)
    return "\n".join(lines)


def _running_lines(worker: Mapping[str, Any]) -> list[str]:
    counts, limit = worker.get("counts") or {}, worker.get("limit")
    progress = f"{counts.get('processed', 0):,} of {counts.get('expected', 0):,} documents"
    if worker.get("rate"):
        progress += f", {worker['rate']:.1f}/s"
    if worker.get("eta_s") is not None:
        progress += f", about {duration(worker['eta_s'])} left"
    calls = f"{worker.get('in_flight', 0)} calls in flight" + (f", limit {limit}" if limit else "")
    more = [_counts(worker), calls]
    if worker.get("mode", "batch") != "batch":
        more.insert(0, f"mode {worker['mode']}")
    if worker.get("breaker") in BREAKER:
        more.append(BREAKER[worker["breaker"]])
    told = [_line(worker, progress), " " * 12 + "; ".join([*more, f"for {duration(worker.get('ran_s'))}"])]
    for state in worker.get("servers") or ():
        told.append(f"{' ' * 12}{server_line(state)}; {state['in_flight']} in flight, limit {state['limit']}")
    return told


def _lost_lines(worker: Mapping[str, Any]) -> list[str]:
    since = f"no sign of life for {duration(worker.get('silent_s'))}"
    advice = "Start the same command again to resume, or use --forget-lost."
    return [_line(worker, f"{since}; {_counts(worker)}"), " " * 12 + advice]


def _line(worker: Mapping[str, Any], text: str) -> str:
    name = f"{worker.get('worker', worker['_id'])} on {worker.get('host', 'an unknown host')}"
    return f"{worker['state']:<11} {name}: {text}"


def _counts(worker: Mapping[str, Any]) -> str:
    counts = worker.get("counts") or {}
    reasons = sorted((worker.get("reasons") or {}).items(), key=lambda pair: -pair[1])
    named = f" ({', '.join(f'{count} x {reason}' for reason, count in reasons)})" if reasons else ""
    return (
        f"{counts.get('successful', 0):,} classified, {counts.get('failed', 0):,} failed, "
        f"{counts.get('skipped', 0):,} skipped{named}"
    )


COMMAND = Command("status", "Show all workers on this MongoDB; exit code 1 if one is lost.", _add_flags, _run)
