"""Sends an answer whole, or damaged by a fault."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from .faults import Fault

JSON_TYPE = "application/json"
_CHUNK = 256 * 1024
_TICK_S = 0.05
_LINGER_ZERO = struct.pack("ii", 1, 0)
_HTML = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>cloudflare</body>\r\n</html>\r\n"


@dataclass
class Reply:
    """An answer before it leaves; *source* is its body or the file that holds it."""

    status: int
    source: bytes | Path
    content_type: str = JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    async def chunks(self, size: int = _CHUNK) -> AsyncIterator[bytes]:
        """The body in pieces of *size*."""
        if isinstance(self.source, bytes):
            for start in range(0, len(self.source), size):
                yield self.source[start : start + size]
            return
        with self.source.open("rb") as opened:
            while piece := opened.read(size):
                yield piece


def json_reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer in JSON."""
    return Reply(status, orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS), JSON_TYPE, dict(headers or {}))


def reset(request: web.Request) -> None:
    """End the connection with a TCP RST instead of a FIN."""
    if request.transport is not None:
        connected: socket.socket = request.transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        request.transport.abort()


async def hang(request: web.Request) -> None:
    """Say nothing until the client leaves."""
    while request.transport is not None and not request.transport.is_closing():
        await asyncio.sleep(_TICK_S)


async def drop(request: web.Request, how: str) -> web.StreamResponse:
    """No answer: ``close``, ``reset``, ``hang``, or ``garbage`` that is no HTTP."""
    if how == "hang":
        await hang(request)
    elif how == "reset":
        reset(request)
    elif request.transport is not None:
        if how == "garbage":
            request.transport.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        request.transport.close()
    return web.Response(status=499)  # nobody gets it: the connection is gone


async def send(request: web.Request, reply: Reply, fault: Fault | None) -> web.StreamResponse:
    """Write the answer."""
    size, speed, cut_at = reply.size, float("inf"), reply.size
    params = fault.params if fault is not None else {}
    kind = fault.kind if fault is not None else ""
    if kind == "not_json":
        reply = Reply(reply.status, _HTML, "text/html", reply.headers)
        size = cut_at = reply.size
    elif kind in ("truncated", "reset_after"):
        cut_at = int(params.get("bytes", size // 2))
    elif kind == "cut":
        size = cut_at = int(params.get("bytes", size // 2))
    elif kind == "slow":
        speed = float(params.get("bytes_per_s", 1000.0))
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_type = reply.content_type
    response.content_length = size
    await response.prepare(request)
    await _write(response, reply, cut_at, speed)
    if kind == "reset_after":
        await asyncio.sleep(_TICK_S)  # lets the bytes before the reset arrive first
        reset(request)
    elif kind == "truncated":
        if request.transport is not None:
            request.transport.close()
    else:
        await response.write_eof()
    return response


async def _write(response: web.StreamResponse, reply: Reply, cut_at: int, speed: float) -> None:
    left = cut_at
    piece_size = _CHUNK if speed == float("inf") else max(1, int(speed * _TICK_S))
    async for piece in reply.chunks(piece_size):
        if left <= 0:
            break
        await response.write(piece[:left])
        left -= len(piece)
        if speed != float("inf"):
            await asyncio.sleep(len(piece) / speed)
