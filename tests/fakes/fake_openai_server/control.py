"""The routes under ``/__fake__/``: knobs, time, statistics, records, and waiting for a gauge."""

import ctypes
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

if TYPE_CHECKING:
    from .server import FakeServer

_PR_SET_PDEATHSIG = 1
_METERS = ("line", "body", "embedding")


class Control:
    """Answers the class ``FakeOpenAI`` in the test process."""

    def __init__(self, server: "FakeServer") -> None:
        self._server = server
        self._routes: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "configure": self._configure,
            "advance": self._advance,
            "reset": self._reset,
            "stats": self._stats,
            "requests": self._requests,
            "meters": self._meters,
            "batches": self._batches,
            "files": self._files,
            "wait": self._wait,
            "die_with_parent": self._die_with_parent,
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one control request; 400 with the reason for a mistake in it."""
        route = self._routes.get(request.match_info["name"])
        if route is None:
            return _answer({"error": f"no such control route: {request.path}"}, 404)
        try:
            return _answer(await route(orjson.loads(await request.read() or b"null")))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            return _answer({"error": f"{type(exc).__name__}: {exc}"}, 400)

    async def _configure(self, changes: Any) -> Any:
        self._server.configure(self._server.knobs.updated(changes), new_faults="faults" in changes)
        return {"ok": True}

    async def _advance(self, wanted: Any) -> Any:
        """Let time pass, and finish all that is due by then."""
        server = self._server
        for row in server.store.objects["batch"].values():
            await server.batches.settle(row)
        server.clock.advance(float(wanted["seconds"]))
        for row in server.store.objects["batch"].values():
            await server.batches.settle(row)
        server.store.save_counters()
        server.changed()
        return {"now": server.now()}

    async def _reset(self, _: Any) -> Any:
        await self._server.reset()
        return {"ok": True}

    async def _stats(self, _: Any) -> Any:
        return self._server.stats()

    async def _requests(self, _: Any) -> Any:
        return list(self._server.records)

    async def _meters(self, wanted: Any) -> Any:
        if wanted["kind"] not in _METERS:
            raise ValueError(f"unknown meter {wanted['kind']!r}; use one of {', '.join(_METERS)}")
        return self._server.store.meters(wanted["kind"])

    async def _batches(self, _: Any) -> Any:
        """Oldest first; looking does not count as a poll."""
        server = self._server
        shown = []
        for row in server.store.objects["batch"].values():
            await server.batches.settle(row)
            shown.append(
                {name: row[name] for name in ("id", "number", "metadata", "input_file_id", "polls", "result")}
                | {"status": server.batches.status(row), "verdict": row["verdict"]}
            )
        return shown

    async def _files(self, _: Any) -> Any:
        return list(self._server.store.objects["file"].values())

    async def _wait(self, wanted: Any) -> Any:
        """``{"gauge", "at_least"? | "equals"?, "timeout_s"}``: answered when it holds, or when time is up."""
        server, gauge = self._server, wanted["gauge"]
        if gauge not in server.gauges() and ":" not in gauge:
            raise ValueError(f"unknown gauge {gauge!r}; use one of {', '.join(server.gauges())}")

        def holds() -> bool:
            value = server.gauges().get(gauge, 0)
            return bool(value == wanted["equals"] if "equals" in wanted else value >= wanted["at_least"])

        reached = await server.wait_until(holds, wanted["timeout_s"])
        return {"reached": reached, "gauges": server.gauges()}

    async def _die_with_parent(self, _: Any) -> Any:
        """Have the kernel kill this process with its parent: a stopped process cannot notice by itself."""
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return {"ok": True}


def _answer(body: Any, status: int = 200) -> web.Response:
    raw = orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(status=status, body=raw, content_type="application/json")
