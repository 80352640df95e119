"""The common part of the two fake servers: a separate process that is started, paused, configured and stopped."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any, Protocol, Self

_START_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0


class Started(Protocol):
    """A running process, as far as a server needs it."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def start_interpreter(command: list[str], stdin: IO[bytes], stdout: IO[bytes]) -> Started:
    """Start a script in a new interpreter; *command* is its file and arguments."""
    return subprocess.Popen([sys.executable, *command], stdin=stdin, stdout=stdout, start_new_session=True)


class ServerProcess:
    """One server process, steered from tests that need no event loop for it.

    The process dies with the one that started it, however that ends.
    """

    # The tests put something cheaper here.
    start_script: Callable[[list[str], IO[bytes], IO[bytes]], Started] = staticmethod(start_interpreter)
    error: type[Exception] = Exception

    def __init__(self, script: str, host: str, port: int, knobs: Mapping[str, Any]) -> None:
        """Prepare; `start` or ``with`` starts it.

        Args:
            port: 0 lets the kernel choose; `restart` keeps the port.
            knobs: What *script* takes as ``--knobs``. An unknown one fails in `start`.
        """
        self.host = host
        self.port = port
        self._script = script
        self._knobs = dict(knobs)
        self._process: Started | None = None
        self._pipes: list[IO[bytes]] = []
        self._paused = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the running server; raises `error` when it does not run."""
        if self._process is None:
            raise self.error("the fake does not run: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Start the process and wait until it listens.

        Raises:
            error: It ended or said nothing; its reason is on standard error.
        """
        if self._process is not None:
            raise self.error("the fake runs already: call stop() or restart()")
        command = [self._script, "--watch-stdin", "--host", self.host, "--port", str(self.port)]
        command += ["--knobs", json.dumps(self._knobs), *self._more_arguments()]
        (their_stdin, our_stdin), (our_stdout, their_stdout) = os.pipe(), os.pipe()
        self._pipes = [os.fdopen(our_stdin, "wb", 0), os.fdopen(our_stdout, "rb", 0)]
        with os.fdopen(their_stdin, "rb") as stdin, os.fdopen(their_stdout, "wb") as stdout:
            self._process = self.start_script(command, stdin, stdout)
        readable, _, _ = select.select([our_stdout], [], [], _START_TIMEOUT_S)
        line = self._pipes[1].readline() if readable else b""
        if not line:
            self.kill()
            raise self.error("the fake did not start: see its message on standard error")
        self.port = json.loads(line)["port"]

    def stop(self) -> None:
        """SIGTERM: no new connections, resets for open ones; waits for the end. Nothing if it does not run."""
        if self._process is None:
            return
        if self._paused:
            self.resume()
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """Stop if it runs, then start on the same port with the knobs configured last."""
        ServerProcess.stop(self)
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the kernel goes on accepting connections, nobody answers."""
        # While it is stopped it cannot see its standard input end; from here on the kernel ends it with us.
        self._call("die_with_parent")
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """SIGCONT after `pause`."""
        os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def configure(self, **knobs: Any) -> None:
        """Change knobs, the others stay; a new ``faults`` list replaces the old one and its ``times`` counts.

        Raises:
            error: A knob, fault kind or condition is unknown; nothing has changed.
        """
        self._call("configure", knobs)
        self._knobs |= knobs

    def wait_for(
        self, gauge: str, at_least: int | None = None, *, equals: int | None = None, timeout_s: float = 30.0
    ) -> None:
        """Return as soon as a number of `stats` is *at_least*, or *equals*, what is given; give one.

        Raises:
            error: It did not happen within *timeout_s*, or the gauge is unknown.
        """
        wanted: dict[str, Any] = {"gauge": gauge, "timeout_s": timeout_s}
        wanted |= {"at_least": at_least} if equals is None else {"equals": equals}
        answer = self._call("wait", wanted, timeout_s + _CALL_TIMEOUT_S)
        if not answer["reached"]:
            raise self.error(f"{gauge} did not get there in {timeout_s} s: {answer['gauges']}")

    def _more_arguments(self) -> list[str]:
        return []

    def _call(
        self, name: str, body: Mapping[str, Any] | None = None, timeout_s: float = _CALL_TIMEOUT_S, method: str = "POST"
    ) -> Any:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, f"/__fake__/{name}", json.dumps(body or {}))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise self.error(answer["error"])
        return answer

    def _reap(self) -> None:
        process, self._process = self._process, None
        self._paused = False
        if process is not None:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
