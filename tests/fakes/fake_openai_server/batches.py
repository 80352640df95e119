"""The life of batches in virtual time."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .results import Built, Job, ResultWriter
from .validation import validate_file

if TYPE_CHECKING:
    from .server import FakeServer

WINDOW_S = 86_400
FILE_LIFE_S = 30 * 86_400
_PATIENCE_S = 2.0  # a poll waits this long for work on large files before it tells the state of before
_ORDER = ("validating", "in_progress", "finalizing", "completed")
TERMINAL = ("completed", "failed", "expired", "cancelled")
_STATED_AT = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class VirtualClock:
    """Unix seconds that pass by `advance`, and with real time as far as ``time_scale`` says."""

    def __init__(self, counters: dict[str, float]) -> None:
        self._counters = counters
        self.start()

    def start(self) -> None:
        """Begin at the real time, unless the counters know a virtual one."""
        self._counters.setdefault("clock", float(int(time.time())))
        self._real = time.monotonic()

    def now(self, time_scale: float) -> float:
        """Virtual unix seconds."""
        real = time.monotonic()
        self._counters["clock"] += (real - self._real) * time_scale
        self._real = real
        return self._counters["clock"]

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._counters["clock"] += seconds


class Batches:
    """Creates, moves and shows batches; their rows live in the store."""

    def __init__(self, server: "FakeServer") -> None:
        self._server = server
        self._store = server.store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def create(self, request: Mapping[str, Any], now: float) -> dict[str, Any]:
        """A new row in ``validating``; its file is checked in the background."""
        number = self._store.next_seq("batch")
        knobs = self._server.knobs
        metadata = request.get("metadata") or None
        row: dict[str, Any] = {
            "id": f"batch_{self._server.new_id()}",
            "seq": number,
            "number": number,
            "created": now,
            "extra_s": 0.0,
            "endpoint": request["endpoint"],
            "input_file_id": request["input_file_id"],
            "completion_window": request["completion_window"],
            "metadata": metadata,
            "output_life_s": (request.get("output_expires_after") or {}).get("seconds", FILE_LIFE_S),
            "plan": self._server.plan.for_batch(number, metadata or {}),
            "timing": {name: getattr(knobs, name) for name in ("validate_s", "run_s", "finalize_s", "cancel_s")},
            "verdict": None,
            "cancel_age": None,
            "result": None,
            "polls": 0,
            "lists": 0,
            "shown": {},
        }
        for fault in row["plan"]:
            if fault["kind"] == "timing":
                row["timing"] |= {key: value for key, value in fault.items() if key in row["timing"]}
        self._store.save("batch", row)
        self._start(row, self._prepare)
        return row

    def resume(self) -> None:
        """After a restart: check again what was not checked."""
        for row in self._store.objects["batch"].values():
            if row["verdict"] is None:
                self._start(row, self._prepare)

    async def stop(self) -> None:
        """Wait for the work that is under way."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def poll(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of ``GET /v1/batches/{id}``; counts as a poll."""
        row["polls"] += 1
        knobs = self._server.knobs
        if knobs.polls_until_done:
            cancelled = row["cancel_age"] is not None
            whole_s = row["timing"]["cancel_s"] if cancelled else self._whole_s(row)
            row["extra_s"] += whole_s / knobs.polls_until_done + 1e-6
        await self.settle(row, _PATIENCE_S)
        shown = self.view(row)
        self._store.save("batch", row)
        return shown

    async def settle(self, row: dict[str, Any], patience_s: float | None = None) -> None:
        """Do what is due in virtual time; returns early, with it under way, after *patience_s*."""
        await self._wait(row, patience_s)
        if row["verdict"] is not None and row["result"] is None and self._due(row):
            self._start(row, self._build)
            await self._wait(row, patience_s)

    def cancel(self, row: dict[str, Any]) -> None:
        """Begin to cancel; nothing when it has ended."""
        if row["cancel_age"] is None:
            row["cancel_age"] = self._age(row)
            self._store.save("batch", row)

    def status(self, row: Mapping[str, Any]) -> str:
        """The true status, whatever faults show."""
        return self._phase(row)[0]

    def visible(self, row: Mapping[str, Any]) -> bool:
        """Return whether it has not vanished."""
        fault = _fault(row, "vanish")
        return fault is None or row["polls"] <= fault.get("after_polls", 1)

    def live_tokens(self) -> int:
        """Prompt tokens enqueued in batches that have not ended."""
        rows = self._store.objects["batch"].values()
        live = [row for row in rows if row["verdict"] is not None and self.status(row) not in TERMINAL]
        return sum(row["verdict"]["tokens"] for row in live)

    # Time

    def _age(self, row: Mapping[str, Any]) -> float:
        return float(self._server.now() - row["created"] + row["extra_s"])

    def _whole_s(self, row: Mapping[str, Any]) -> float:
        """Virtual seconds from creation to the end of an undisturbed life."""
        timing = row["timing"]
        whole = timing["validate_s"] + timing["run_s"] + timing["finalize_s"]
        return float(WINDOW_S) if _fault(row, "expire") else min(whole, float(WINDOW_S))

    def _phase(self, row: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
        """Status by age, and the age at which each past status began."""
        age, timing = self._age(row), row["timing"]
        began: dict[str, float] = {}
        starts = timing["validate_s"]
        ends = starts + timing["run_s"]
        cancel_age = row["cancel_age"]
        if (spontaneous := _fault(row, "cancel")) and cancel_age is None:
            at = spontaneous.get("at_s", (starts + ends) / 2)
            cancel_age = at if age >= at else None
        if row["verdict"] is None:
            return "validating", began
        if row["verdict"]["errors"]:
            return ("failed", {"failed": starts}) if age >= starts else ("validating", began)
        steps = [("in_progress", starts)]
        if _fault(row, "expire") or ends + timing["finalize_s"] > WINDOW_S:
            steps += [("finalizing", WINDOW_S), ("expired", WINDOW_S)]
        else:
            steps += [("finalizing", ends), ("completed", ends + timing["finalize_s"])]
        if cancel_age is not None:
            steps = [step for step in steps if step[1] < cancel_age]
            steps += [("cancelling", cancel_age), ("cancelled", cancel_age + timing["cancel_s"])]
        status = "validating"
        for name, at in steps:
            if age >= at:
                status = name
                began[name] = at
        return status, began

    def _due(self, row: Mapping[str, Any]) -> bool:
        return self.status(row) in ("completed", "expired", "cancelled")

    def _run_count(self, row: Mapping[str, Any]) -> int:
        """Return the number of lines that had run when the batch ended."""
        status, began = self._phase(row)
        total: int = row["verdict"]["total"]
        for kind, ended in (("expire", "expired"), ("cancel", "cancelled")):
            fault = _fault(row, kind)
            if fault is not None and status == ended and "done" in fault:
                return int(total * fault["done"])
        stopped_at = began.get("cancelling", float(WINDOW_S) if status == "expired" else None)
        if status == "expired" and _fault(row, "expire"):
            return total // 2
        return total if stopped_at is None else self._progress(row, stopped_at)

    def _progress(self, row: Mapping[str, Any], age: float) -> int:
        timing, total = row["timing"], row["verdict"]["total"]
        share = (age - timing["validate_s"]) / timing["run_s"] if timing["run_s"] else 1.0
        return int(total * min(1.0, max(0.0, share)))

    # Work in the background

    def _start(self, row: dict[str, Any], work: Callable[[dict[str, Any]], Any]) -> None:
        if row["id"] not in self._tasks:
            task = asyncio.create_task(work(row))
            self._tasks[row["id"]] = task
            task.add_done_callback(lambda _: self._tasks.pop(row["id"], None))

    async def _wait(self, row: Mapping[str, Any], patience_s: float | None) -> None:
        task = self._tasks.get(row["id"])
        if task is not None:
            await asyncio.wait([task], timeout=patience_s)
            if task.done():
                task.result()

    async def _prepare(self, row: dict[str, Any]) -> None:
        knobs, store = self._server.knobs, self._store
        file = store.objects["file"].get(row["input_file_id"], {"purpose": "batch"})
        path = store.path(row["input_file_id"])
        custom_ids: list[str] = []
        verdict = await asyncio.to_thread(validate_file, path, file["purpose"], row["endpoint"], knobs, custom_ids)
        if fault := _fault(row, "fail"):
            data = fault.get("errors") or [{"code": "invalid_request", "message": "The batch failed validation."}]
            verdict.errors = [{"code": None, "line": None, "message": None, "param": None} | entry for entry in data]
        limit = knobs.enqueued_token_limit
        over = limit is not None and self.live_tokens() + verdict.tokens > limit
        if not verdict.errors and (over or _fault(row, "token_limit_exceeded")):
            verdict.add(
                "token_limit_exceeded",
                f"Enqueued token limit reached for {verdict.model} in organization org-fake. Limit:"
                f" {limit or 2_000_000:,} enqueued tokens. Please try again once some in_progress batches have been"
                " completed.",
            )
        row["verdict"] = {name: getattr(verdict, name) for name in ("total", "tokens", "model", "errors")}
        with store.together():
            if not verdict.errors:
                store.meter("line", custom_ids, submitted=1)
            store.save("batch", row)
        self._server.changed()

    async def _build(self, row: dict[str, Any]) -> None:
        server, store = self._server, self._store
        output_id, error_id = f"file-{server.new_id()}", f"file-{server.new_id()}"
        not_run = "batch_expired" if self.status(row) == "expired" else "batch_cancelled"
        job = Job(
            row,
            store.path(row["input_file_id"]),
            store.path(output_id),
            store.path(error_id),
            self._run_count(row),
            not_run,
            int(server.now()),
        )
        # Answers of lines do not depend on how long the service takes for them.
        writer = ResultWriter(job, replace(server.knobs, latency_s=0.0), server.plan)
        built = await asyncio.to_thread(writer.write)
        with store.together():
            store.meter("line", built.billed_ids, billed=1)
            store.meter("body", built.billed_bodies, billed=1)
            row["result"] = {
                "output_file_id": self._keep(row, output_id, "output", built.output_lines),
                "error_file_id": self._keep(row, error_id, "error", built.error_lines),
                **_numbers(built),
            }
            store.save("batch", row)
            store.save_counters()
        server.changed()

    def _keep(self, row: Mapping[str, Any], file_id: str, name: str, lines: int) -> str | None:
        """Make a written file one of the service, unless it is empty or a fault loses it."""
        forced = name == "error" and _fault(row, "empty_error_file") is not None
        if (not lines and not forced) or _fault(row, f"no_{name}_file") is not None:
            self._store.path(file_id).unlink()
            return None
        self._server.add_file(file_id, f"{row['id']}_{name}.jsonl", "batch_output", row["output_life_s"])
        if name == "output" and _fault(row, "output_gone") is not None:
            self._store.path(file_id).unlink()
        return file_id

    # What clients see

    def view(self, row: dict[str, Any]) -> dict[str, Any]:
        """The Batch object, spoiled by the batch's faults; counts what those show."""
        status, began = self._phase(row)
        if status in ("completed", "expired", "cancelled") and row["result"] is None:
            status = "cancelling" if status == "cancelled" else "finalizing"
            began = {name: at for name, at in began.items() if name not in TERMINAL}
        shown = self._held(row, status)
        if shown != status and shown in _ORDER:
            place = _ORDER.index(shown)
            began = {name: at for name, at in began.items() if name in _ORDER[: place + 1]}
        verdict = row["verdict"] or {"total": 0, "tokens": 0, "model": None, "errors": []}
        stamps = {f"{name}_at": int(row["created"] + began[name]) if name in began else None for name in _STATED_AT}
        errors = {"object": "list", "data": verdict["errors"]} if status == "failed" else None
        return {
            "id": row["id"],
            "object": "batch",
            "endpoint": row["endpoint"],
            "model": verdict["model"],
            "errors": errors,
            "input_file_id": row["input_file_id"],
            "completion_window": row["completion_window"],
            "status": shown,
            **self._files(row, shown),
            "created_at": int(row["created"]),
            "expires_at": int(row["created"] + WINDOW_S),
            **stamps,
            "request_counts": self._counts(row, shown, verdict),
            "usage": (row["result"] or {}).get("usage") if shown in TERMINAL else None,
            "metadata": row["metadata"],
        }

    def _held(self, row: dict[str, Any], status: str) -> str:
        """The status to show: held back, or one that nobody knows."""
        hold = _fault(row, "hold")
        if hold is not None and status in TERMINAL + _ORDER:
            wanted = hold.get("status", "finalizing")
            past = status in TERMINAL or _ORDER.index(status) > _ORDER.index(wanted)
            if past and _shows(row, "hold", hold):
                return str(wanted)
        strange = _fault(row, "status_value")
        if (
            strange is not None
            and status == strange.get("instead_of", "in_progress")
            and _shows(row, "status_value", strange)
        ):
            return str(strange.get("value", "paused"))
        return status

    def _files(self, row: dict[str, Any], status: str) -> dict[str, Any]:
        result = row["result"] if status in TERMINAL else None
        ids = {name: (result or {}).get(name) for name in ("output_file_id", "error_file_id")}
        late = _fault(row, "late_output")
        if late is not None and result is not None and _shows(row, "late_output", late):
            ids = dict.fromkeys(ids)
        if _fault(row, "empty_id") is not None and status in TERMINAL:
            ids = {name: value or "" for name, value in ids.items()}
        return ids

    def _counts(self, row: Mapping[str, Any], status: str, verdict: Mapping[str, Any]) -> dict[str, Any] | None:
        fault = _fault(row, "counts")
        if fault is not None:
            value: dict[str, Any] | None = fault.get("value")
            return value
        if status in ("validating", "failed"):
            return {"total": 0, "completed": 0, "failed": 0}
        if status in TERMINAL and row["result"]:
            return {"total": verdict["total"]} | {name: row["result"][name] for name in ("completed", "failed")}
        age = self._age(row) if row["cancel_age"] is None else row["cancel_age"]
        return {"total": verdict["total"], "completed": self._progress(row, age), "failed": 0}


def _fault(row: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    return next((fault for fault in row["plan"] if fault["kind"] == kind), None)


def _shows(row: dict[str, Any], name: str, fault: Mapping[str, Any]) -> bool:
    """Return whether a fault that shows something for some polls shows it once more; without ``polls``, always."""
    shown = row["shown"].get(name, 0)
    if shown >= fault.get("polls", float("inf")):
        return False
    row["shown"][name] = shown + 1
    return True


def _numbers(built: Built) -> dict[str, Any]:
    usage = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0) | built.usage
    usage_body: dict[str, Any] = usage | {
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {"completed": built.completed, "failed": built.failed, "usage": usage_body}
