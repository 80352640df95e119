"""The server process: event loop, listening socket, signals, and not outliving the parent."""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import uvloop
from aiohttp import web

from tests.fakes.listening_socket import listening_socket

from .control import Control
from .knobs import Knobs
from .server import FakeServer

_GRACE_S = 0.1


def serve(
    host: str, port: int, knobs: Knobs, directory: Path, *, watch_stdin: bool = False, temporary: bool = False
) -> None:
    """Run until SIGTERM; prints ``{"port", "pid"}`` on stdout once it listens.

    Args:
        port: 0 lets the kernel choose.
        directory: Where the state lies; what is there already is taken up.
        watch_stdin: Exit at the end of standard input, which comes when the parent dies.
        temporary: Remove *directory* then.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listening_socket(host, port), knobs, directory, (watch_stdin, temporary)))


async def _unknown(request: web.Request) -> web.StreamResponse:
    raise AssertionError(f"the middleware answers {request.path}")


async def _serve(listener: socket.socket, knobs: Knobs, directory: Path, orphaned: tuple[bool, bool]) -> None:
    loop = asyncio.get_running_loop()
    server = FakeServer(directory, knobs)
    stopped = asyncio.Event()
    watch_stdin, temporary = orphaned

    def stdin_readable() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            if temporary:
                shutil.rmtree(directory, ignore_errors=True)
            os._exit(0)

    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    if watch_stdin:
        loop.add_reader(sys.stdin.fileno(), stdin_readable)
    app = web.Application(middlewares=[server.handle], client_max_size=256 * 1024 * 1024)
    app.router.add_route("*", "/__fake__/{name}", Control(server).handle)
    app.router.add_route("*", "/{path:.*}", _unknown)
    server.batches.resume()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_GRACE_S)
    await runner.setup()
    await web.SockSite(runner, listener, backlog=1024).start()
    print(json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}), flush=True)
    await stopped.wait()
    await runner.cleanup()
    server.store.close()


def main(argv: list[str] | None = None) -> int:
    """Run the server in this process until SIGTERM."""
    parser = argparse.ArgumentParser(description="A fake OpenAI API; see the docstring of tests/fakes/fake_openai.py.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 lets the kernel choose")
    parser.add_argument("--directory", type=Path, help="state; a temporary one without it")
    parser.add_argument("--knobs", type=json.loads, default={}, help="JSON object with any knob")
    parser.add_argument("--watch-stdin", action="store_true", help="exit when standard input ends")
    parser.add_argument("--temporary", action="store_true", help="remove the directory then")
    args = parser.parse_args(argv)

    try:
        knobs = Knobs().updated(args.knobs)
    except ValueError as exc:
        parser.error(str(exc))
    with tempfile.TemporaryDirectory(prefix="fake_openai_") as spare:
        directory = args.directory or Path(spare)
        serve(args.host, args.port, knobs, directory, watch_stdin=args.watch_stdin, temporary=args.temporary)
    return 0
