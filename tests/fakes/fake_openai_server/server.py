"""All state of one fake, and the life of a request between the wire and the routes."""

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from .api import Api, route_name
from .batches import Batches, VirtualClock
from .execution import ApiError, error_body
from .faults import ARRIVAL_KINDS, STATUS_KINDS, Fault, FaultPlan
from .knobs import Knobs
from .store import Store
from .wire import Reply, drop, json_reply, send

_FIRST_BYTES = 65_536  # of a body are looked at for ``when.text``
_DROPPED = frozenset({"close", "reset", "hang", "garbage"})


class FakeServer:
    """Knobs, store, batches, counts."""

    def __init__(self, directory: Path, knobs: Knobs) -> None:
        self.store = Store(directory)
        self.counters = self.store.counters
        self.clock = VirtualClock(self.counters)  # type: ignore[arg-type]
        self.started_knobs = knobs
        self.in_flight = 0
        self.max_in_flight = 0
        self.sync_in_flight = 0
        self.max_sync_in_flight = 0
        self.internal_errors = 0
        self.records: deque[dict[str, Any]] = deque()
        self._changed = asyncio.Event()
        self.knobs = knobs
        self.plan = FaultPlan(knobs.faults, self.counters)
        self.slots = asyncio.Semaphore(knobs.slots)
        self.batches = Batches(self)
        self.api = Api(self)

    def configure(self, knobs: Knobs, *, new_faults: bool) -> None:
        """Use *knobs* from now on; *new_faults* count their ``times`` from the beginning.

        Raises:
            ValueError: A fault is malformed; then nothing has changed.
        """
        plan = FaultPlan(knobs.faults, self.counters)
        if new_faults:
            for name in [name for name in self.counters if name.startswith("fault:")]:
                self.counters[name] = 0
        if knobs.slots != self.knobs.slots:
            self.slots = asyncio.Semaphore(knobs.slots)
        self.knobs, self.plan = knobs, plan
        self.store.save_counters()

    async def reset(self) -> None:
        """No files, no batches, all counts at zero, the knobs of the start."""
        await self.batches.stop()
        self.store.clear()
        self.records.clear()
        self.clock.start()
        self.max_in_flight = self.in_flight
        self.max_sync_in_flight = self.sync_in_flight
        self.configure(self.started_knobs, new_faults=True)
        self.changed()

    def now(self) -> float:
        """Virtual unix seconds."""
        return self.clock.now(self.knobs.time_scale)

    def new_id(self) -> str:
        """24 characters, the same in every run with the same requests."""
        return hashlib.sha256(str(self.store.next_seq("id")).encode()).hexdigest()[:24]

    def add_file(self, file_id: str, filename: str, purpose: str, life_s: float) -> dict[str, Any]:
        """Make the bytes at the store's path of *file_id* a file of the service."""
        now = self.now()
        row = {
            "id": file_id,
            "seq": self.store.next_seq("file"),
            "object": "file",
            "bytes": self.store.path(file_id).stat().st_size,
            "created_at": int(now),
            "expires_at": int(now + life_s),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
            "lists": 0,
        }
        self.store.save("file", row)
        return row

    def changed(self) -> None:
        """Wake those who wait for a gauge."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Return whether *holds* came true within *timeout_s*."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True

    def gauges(self) -> dict[str, Any]:
        """Numbers that change while requests run; ``wait_for`` looks at these."""
        counters = self.counters
        by_status: dict[str, int] = {}
        for row in self.store.objects["batch"].values():
            status = self.batches.status(row)
            by_status[status] = by_status.get(status, 0) + 1
        named = {name: int(n) for name, n in counters.items() if name.startswith(("requests:", "faults:", "status:"))}
        return {
            "requests": int(counters["requests"]),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "sync_in_flight": self.sync_in_flight,
            "max_sync_in_flight": self.max_sync_in_flight,
            "batches_created": int(counters["seq:batch"]),
            "files_uploaded": int(counters["files_uploaded"]),
            "files_deleted": int(counters["files_deleted"]),
            "bytes_uploaded": int(counters["bytes_uploaded"]),
            "answers_lost": int(counters["answers_lost"]),
            **named,
            **{f"batches:{status}": count for status, count in by_status.items()},
        }

    def stats(self) -> dict[str, Any]:
        """`gauges`, and what takes a look at the database."""
        totals: dict[str, Any] = {}
        for kind, name in (("line", "lines"), ("body", "bodies"), ("embedding", "embed_inputs")):
            submitted, billed, most = self.store.meter_totals(kind)
            totals |= {f"{name}_submitted": submitted, f"{name}_billed": billed, f"max_billed_per_{kind}": most}
        del totals["bodies_submitted"]
        process = {"pid": os.getpid(), "cpu_s": time.process_time(), "now": self.now()}
        return self.gauges() | totals | {"internal_errors": self.internal_errors} | process

    # Requests

    @web.middleware
    async def handle(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer one request, whatever becomes of the client meanwhile."""
        if request.path.startswith("/__fake__/"):
            return await handler(request)
        route = route_name(request.method, request.path)
        index = int(self.counters[f"requests:{route}"])
        self.counters[f"requests:{route}"] += 1
        self.counters["requests"] += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        record = self._record(request, route, index)
        request["arrived_s"] = record["start_s"]
        self.changed()
        try:
            response = await self._answer(request, route, index, record)
        except ConnectionError:
            record["outcome"] = "client_left"
            response = web.Response(status=499)  # to nobody
        finally:
            self.in_flight -= 1
            record["end_s"] = time.monotonic()
            self.store.save_counters()
            self.changed()
        return response

    def _record(self, request: web.Request, route: str, index: int) -> dict[str, Any]:
        record: dict[str, Any] = {
            "route": route,
            "index": index,
            "method": request.method,
            "path": request.path_qs,
            "start_s": time.monotonic(),
            "end_s": None,
            "outcome": "open",
            "fault": None,
            "user_agent": request.headers.get("User-Agent", ""),
            "retry_count": request.headers.get("x-stainless-retry-count"),
        }
        if self.knobs.record:
            self.records.append(record)
            if len(self.records) > self.knobs.record_limit:
                self.records.popleft()
        return record

    async def _answer(self, request: web.Request, route: str, index: int, record: dict[str, Any]) -> web.StreamResponse:
        body = b"" if route == "files.create" else await request.read()
        texts = (body[:_FIRST_BYTES].decode(errors="replace"), request.path_qs)
        if route == "embeddings.create":
            texts = (body.decode(errors="replace"), request.path_qs)
        fault, delay_s = self.plan.for_request(route, index, texts)
        record["fault"] = fault.kind if fault is not None else None
        self.changed()
        if delay_s:
            await asyncio.sleep(delay_s)
        if fault is not None and fault.kind in _DROPPED:
            record["outcome"] = "dropped"
            return await drop(request, fault.kind)
        if fault is not None and fault.kind in ARRIVAL_KINDS:
            reply = _status_reply(fault)
        else:
            reply = await self._reply(request, route, body, fault)
        reply.headers = self._headers(reply) | reply.headers
        self.counters[f"status:{reply.status}"] += 1
        if fault is not None and fault.kind == "answer_lost":
            record["outcome"] = "answer_lost"
            self.counters["answers_lost"] += 1
            self.store.save_counters()
            self.changed()
            if (how := fault.params.get("how", "close")) == "408":
                return await send(request, json_reply(error_body("stream timeout"), 408), None)
            return await drop(request, how)
        record["outcome"] = reply.status
        return await send(request, reply, fault)

    async def _reply(self, request: web.Request, route: str, body: bytes, fault: Fault | None) -> Reply:
        try:
            self._authorise(request)
            return await self.api.handle(request, route, body, fault)
        except ApiError as exc:
            return json_reply(exc.body, exc.status)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            self.internal_errors += 1
            raise

    def _authorise(self, request: web.Request) -> None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not key.strip():
            message = (
                "You didn't provide an API key. You need to provide your API key in an Authorization header using"
                " Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise ApiError(401, message)
        if self.knobs.api_keys is not None and key.strip() not in self.knobs.api_keys:
            message = (
                f"Incorrect API key provided: {key[:5]}*****. You can find your API key at"
                " https://platform.openai.com/account/api-keys."
            )
            raise ApiError(401, message, "invalid_api_key")

    def _headers(self, reply: Reply) -> dict[str, str]:
        headers = {
            "x-request-id": f"req_{self.new_id()}",
            "openai-version": "2020-10-01",
            "openai-organization": "org-fake",
            "openai-processing-ms": "1",
        }
        if reply.status != 401:
            left = max(0, 10_000 - self.in_flight)
            headers |= {
                "x-ratelimit-limit-requests": "10000",
                "x-ratelimit-remaining-requests": str(left),
                "x-ratelimit-reset-requests": "6ms",
                "x-ratelimit-limit-tokens": "10000000",
                "x-ratelimit-remaining-tokens": "9999000",
                "x-ratelimit-reset-tokens": "6ms",
            }
        return headers


def _status_reply(fault: Fault) -> Reply:
    params = fault.params
    headers = {name: str(value) for name, value in params.get("headers", {}).items()}
    if "retry_after" in params:
        headers["Retry-After"] = str(params["retry_after"])
    if "retry_after_ms" in params:
        headers["retry-after-ms"] = str(params["retry_after_ms"])
    if fault.kind == "bad_gateway_502":
        return Reply(502, b"<html><head><title>502 Bad Gateway</title></head></html>", "text/html", headers)
    if fault.kind == "status":
        status = int(params["status"])
        body = params.get("body") or error_body(params.get("message", "The fake says no."), params.get("code"))
        if isinstance(body, str):
            return Reply(status, body.encode(), params.get("content_type", "text/plain"), headers)
        return Reply(status, json.dumps(body).encode(), headers=headers)
    status, kind, code, message = STATUS_KINDS[fault.kind]
    return json_reply(error_body(params.get("message", message), params.get("code", code), None, kind), status, headers)
