"""The server process: event loop, listening socket, signals, and not outliving the parent."""

import asyncio
import gc
import json
import os
import signal
import socket
import sys
from typing import Any

import uvloop

from tests.fakes.listening_socket import listening_socket

from .knobs import Knobs
from .server import FakeServer
from .wire import Connection


def serve(host: str, port: int, knobs: Knobs, *, watch_stdin: bool = False) -> None:
    """Run until SIGTERM; prints ``{"port", "pid"}`` on stdout once it listens.

    Args:
        port: 0 lets the kernel choose.
        watch_stdin: Exit at the end of standard input, which comes when the parent dies.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listening_socket(host, port), knobs, watch_stdin))


async def _serve(listener: socket.socket, knobs: Knobs, watch_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    server = FakeServer(loop, knobs)
    stopped = asyncio.Event()

    def count_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        server.internal_errors += 1
        loop.default_exception_handler(context)

    def stdin_readable() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            os._exit(0)

    loop.set_exception_handler(count_error)
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    if watch_stdin:
        loop.add_reader(sys.stdin.fileno(), stdin_readable)
    # Long-lived objects need not be looked at again, and requests leave few cycles behind.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    listening = await loop.create_server(lambda: Connection(server), sock=listener, backlog=1024)
    print(json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}), flush=True)
    await stopped.wait()
    # As Ollama on SIGTERM: the listener goes at once and every client sees a reset.
    listening.close()
    for connection in list(server.connections):
        connection.reset()
    await asyncio.sleep(0)
