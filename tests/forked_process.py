"""Scripts of the product as processes of their own, at the price of a fork.

Most of the time of a short ``python cli.py`` goes into importing what it needs. A *nursery* process has done that
once; for each start it forks a child that becomes the script: own process id and group, environment, folder and
files, killed and waited for like any other child of the test. (The nursery forks twice, so that the child's parent is
the test, which has made itself a subreaper: prctl(2).) Nothing else differs: a script that does something on import, or
keeps state in modules, would show here.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, TextIO

ROOT = Path(__file__).parent.parent
PR_SET_CHILD_SUBREAPER = 36

_nursery: tuple[int, socket.socket, TextIO] | None = None


class ForkedProcess:
    """What ``subprocess.Popen`` is for the other processes, as far as the tests need it."""

    def __init__(self, script: list[str], env: dict[str, str], cwd: Path, files: tuple[Path, Path]) -> None:
        """Start *script* in a session of its own; *files* get its stdout and stderr.

        Its first entry is a file, or ``-m`` with the name of a module behind it; arguments follow.
        """
        self.files = files
        connection, answers = _started_nursery()
        order = {"script": script, "env": env, "cwd": str(cwd), "files": [str(path) for path in files]}
        connection.sendall(json.dumps(order).encode() + b"\n")
        self.pid = int(answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal), None while it runs."""
        if self.returncode is None:
            self._collect(os.WNOHANG)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; raise ``subprocess.TimeoutExpired`` after *timeout* seconds."""
        if self.returncode is None:
            handle = os.pidfd_open(self.pid)
            try:
                if not select.select([handle], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            finally:
                os.close(handle)
            self._collect(0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it wrote to stdout and stderr."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self.files)
        return out, err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()

    def _collect(self, options: int) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)


def _started_nursery() -> tuple[socket.socket, TextIO]:
    global _nursery  # noqa: PLW0603 - one for each process that runs tests
    if _nursery is None or _nursery[0] != os.getpid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
        )
        theirs.close()
        answers = ours.makefile()
        assert answers.readline() == "ready\n"
        _nursery = (os.getpid(), ours, answers)

        def end() -> None:
            answers.close()
            ours.close()
            process.wait()

        atexit.register(end)
    return _nursery[1:]


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork a child for each order; return, in the child alone, what it was ordered."""
    import cli  # noqa: F401 - what each child would have to import

    lines = connection.makefile()
    connection.sendall(b"ready\n")
    for line in lines:
        read_end, write_end = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child == 0:
                os.close(read_end)
                os.close(write_end)
                lines.close()
                connection.close()
                order: dict[str, Any] = json.loads(line)
                return order
            os.write(write_end, str(child).encode())
            os._exit(0)
        os.close(write_end)
        child_id = os.read(read_end, 20)
        os.close(read_end)
        os.waitpid(middle, 0)
        connection.sendall(child_id + b"\n")
    os._exit(0)


def _become(order: dict[str, Any]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for path, number in zip(("/dev/null", *order["files"]), (0, 1, 2), strict=True):
        handle = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    if order["script"][0] == "-m":
        sys.argv = order["script"][1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = order["script"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
