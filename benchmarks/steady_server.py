"""An embeddings server that only answers each call after a fixed time, in its own process.

The fake of the tests counts every text and computes every vector in one process: with four concurrent calls it needs 52 to
53 ms for an answer after 50 ms. Here all vectors are equal and made in advance, so only the caller is measured.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import time
from array import array
from types import TracebackType

import uvloop

TIMER_S = 0.002  # the most that a timer of the loop is late
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class SteadyServer:
    """Use as ``with``; *url* is for OPENAI_BASE_URL. Every call must have *inputs* texts."""

    def __init__(self, latency_s: float, inputs: int, dimensions: int) -> None:
        command = [sys.executable, "-m", "benchmarks.steady_server", str(latency_s), str(inputs), str(dimensions)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> SteadyServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def calls(self) -> list[tuple[float, float]]:
        """Return the arrival and answer times, in seconds, of each call since the previous request for them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("calls\n")
        self._process.stdin.flush()
        return [(start_s, end_s) for start_s, end_s in json.loads(self._process.stdout.readline())]


async def _serve(latency_s: float, inputs: int, dimensions: int) -> None:
    vector = base64.b64encode(array("f", [1.0] * dimensions).tobytes()).decode()
    data = [{"object": "embedding", "index": place, "embedding": vector} for place in range(inputs)]
    usage = {"prompt_tokens": inputs, "total_tokens": inputs}
    body = json.dumps({"object": "list", "data": data, "model": "m", "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    answered = head + body
    calls: list[tuple[float, float]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                request = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            start_s = time.monotonic()
            found = _LENGTH.search(request)
            await reader.readexactly(int(found[1]) if found else 0)
            await asyncio.sleep(latency_s - TIMER_S - (time.monotonic() - start_s))
            while time.monotonic() - start_s < latency_s:
                await asyncio.sleep(0)
            writer.write(answered)
            calls.append((start_s, time.monotonic()))
            await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        sys.stdout.write(json.dumps(calls) + "\n")
        sys.stdout.flush()
        calls.clear()


if __name__ == "__main__":
    uvloop.run(_serve(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
