"""Programs of the project as processes of their own, at the price of a fork.

Most of the time of a short ``python cli.py`` goes into importing what it needs. A *nursery* process has done that
once; for each start it forks a child that becomes the script: own process id and group, environment, folder and
files, killed and waited for like any other child of the test. (The nursery forks twice, so that the child's parent is
the test, which has made itself a subreaper: prctl(2).) Nothing else differs: a script that does something on import, or
keeps state in modules, would show here. Only what Python reads before it reads a script does not count (``-W``, ``-u``,
variables as PYTHONWARNINGS), and no module is taken apart at the end, so tests/test_entry_points.py starts each entry
point with a new interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Self

ROOT = Path(__file__).parent.parent
PR_SET_CHILD_SUBREAPER = 36
NUMBER_BYTES = 12
# What the programs import, at once or when they need it. No script with an `if __name__` of its own but cli and main.
PRELOADED = (
    *("cli", "main", "openai_batch.actions", "commands.doctor", "commands.estimate"),
    *("commands.plan", "commands.quarantine", "commands.review", "service.client.client", "uvicorn.main"),
    *(
        "tests.fakes.fake_ollama_server.process",
        "tests.fakes.fake_openai_server.process",
        "tests.openai_batch.openai_job",
    ),
)
# The same for `cli.py index`, which not all processes that run tests start.
OF_THE_INDEX = (
    *("embedding_index.actions", "commands.index", "embedding_index.providers.openai_embeddings"),
    *("sqlalchemy.dialects.sqlite", "anyio._backends._asyncio", "httpcore2", "genai_prices.data"),
    *("rich._emoji_codes", "tests.embedding_index.loaded_tokenizer"),
)
# The same for services with API_EMBEDDED.
OF_THE_BUILT_IN_CLASSIFIER = ("embedded.embedding_classifier", "vaderSentiment.vaderSentiment")

_nursery: tuple[int, socket.socket] | None = None
_one_start_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command; on a terminal all output is in *out*."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output of ``--json``."""
        return json.loads(self.out)

    @property
    def said(self) -> str:
        """Everything it printed."""
        return self.out + self.err


class ForkedProcess:
    """A forked process with the part of the interface of ``subprocess.Popen`` that the tests need."""

    def __init__(
        self,
        script: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        files: tuple[Path, Path] | None,
        *,
        streams: Sequence[int] = (),
        preload: Sequence[str] = (),
    ) -> None:
        """Start *script* in a new session; *files* get its stdout and stderr.

        *preload* names modules that take long to import and that not all tests need: the nursery keeps them from now on.
        *streams* are its descriptors 0, 1 and 2 instead, as far as given; with all three *files* may be None.

        Its first entry is a file, ``-m`` with the name of a module behind it, or ``-c`` with a program; arguments
        follow. Where 0 is a terminal, it becomes the one that the process has Ctrl-C from.
        """
        self.files = files
        self.returncode: int | None = None
        wanted = {"script": list(script), "env": dict(env), "cwd": str(cwd), "preload": list(preload)}
        order = json.dumps(wanted).encode()
        with ExitStack() as opened, _one_start_at_a_time:
            usual = ((Path(os.devnull), "rb"), *((path, "ab") for path in files or ()))
            own = [opened.enter_context(path.open(mode)).fileno() for path, mode in usual[len(streams) :]]
            connection = _started_nursery()
            socket.send_fds(connection, [_number(len(order))], [*streams, *own])
            connection.sendall(order)
            self.pid = int(connection.recv(NUMBER_BYTES, socket.MSG_WAITALL))

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

    def send_signal(self, number: int) -> None:
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
        assert self.files is not None
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self.files)
        return out, err

    def stop(self, number: int = signal.SIGTERM, timeout: float = 90.0) -> Ended:
        """Send a signal, and wait for the end."""
        self.send_signal(number)
        out, err = self.communicate(timeout)
        return Ended(self.wait(), out, err)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()

    def _collect(self, options: int) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)


class PipedProcess(ForkedProcess):
    """A program that reads lines from a pipe and writes lines to another."""

    def __init__(self, script: Sequence[str], cwd: Path = ROOT, *, preload: Sequence[str] = ()) -> None:
        """Start *script* with the environment of this process; its stderr is that of this process."""
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        super().__init__(script, os.environ, cwd, None, streams=[read_in, write_out, 2], preload=preload)
        os.close(read_in)
        os.close(write_out)
        self.stdin = open(write_in, "w", encoding="utf-8")  # noqa: SIM115 - closed by finish
        self.stdout = open(read_out, encoding="utf-8")  # noqa: SIM115 - closed by finish

    def finish(self, said: str = "") -> str:
        """Say *said* and no more; wait for its end and return what it said until then."""
        with self.stdin, self.stdout:
            if said:
                self.stdin.write(said)
            with suppress(BrokenPipeError):
                self.stdin.close()
            rest = self.stdout.read()
        self.wait()
        return rest


def run_forked(
    script: Sequence[str | Path],
    env: Mapping[str, str],
    cwd: Path,
    timeout_s: float = 60.0,
    *,
    streams: Sequence[int] = (),
    preload: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run *script* to its end, as ``subprocess.run`` with captured output does; kill it after *timeout_s*."""
    command = [str(part) for part in script]
    with (
        tempfile.TemporaryDirectory() as folder,
        ForkedProcess(
            command, env, cwd, (Path(folder, "out"), Path(folder, "err")), streams=streams, preload=preload
        ) as process,
    ):
        out, err = process.communicate(timeout_s)
    return subprocess.CompletedProcess(command, process.wait(), out, err)


def fork_script(command: list[str], stdin: IO[bytes], stdout: IO[bytes]) -> ForkedProcess:
    """Start a script as ``server_process.start_interpreter`` does."""
    return ForkedProcess(command, os.environ, Path.cwd(), None, streams=[stdin.fileno(), stdout.fileno(), 2])


def _number(value: int) -> bytes:
    return b"%*d" % (NUMBER_BYTES, value)


def _started_nursery() -> socket.socket:
    global _nursery  # noqa: PLW0603 - one for each process that runs tests
    if _nursery is None or _nursery[0] != os.getpid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
        )
        theirs.close()
        assert int(ours.recv(NUMBER_BYTES, socket.MSG_WAITALL)) == process.pid
        _nursery = (os.getpid(), ours)

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
    return _nursery[1]


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork a child for each order; return, in the child alone, what it was ordered."""
    _preload(PRELOADED)
    connection.sendall(_number(os.getpid()))
    while True:
        length, streams, _, _ = socket.recv_fds(connection, NUMBER_BYTES, 3)
        if not length:
            os._exit(0)
        order = json.loads(connection.recv(int(length), socket.MSG_WAITALL))
        _preload(order["preload"])
        read_end, write_end = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child == 0:
                connection.close()
                os.close(read_end)
                os.close(write_end)
                return {"streams": streams, **order}
            os.write(write_end, _number(child))
            os._exit(0)
        for handle in (write_end, *streams):
            os.close(handle)
        child_id = os.read(read_end, NUMBER_BYTES)
        os.close(read_end)
        os.waitpid(middle, 0)
        connection.sendall(child_id)


def _preload(names: Sequence[str]) -> None:
    if not all(name in sys.modules for name in names):
        gc.disable()  # what is imported stays
        for name in names:
            importlib.import_module(name)
        assert threading.active_count() == 1, "a fork would not take the threads along"
        gc.collect()
        gc.freeze()
        gc.enable()


def _become(order: dict[str, Any]) -> None:
    """Give the process what was ordered."""
    os.setsid()
    # A suite started in the background of a script ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])
    for number, handle in enumerate(order["streams"]):
        os.dup2(handle, number)
        os.close(handle)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _run(script: Sequence[str], cwd: str, usual_path: list[str]) -> None:
    """Run *script* as an interpreter does: the first of the path is its folder, or for ``-m`` the current one."""
    first, *arguments = script
    is_file = first not in ("-c", "-m")
    given_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [str(Path(first).resolve().parent) if is_file else cwd, *given_path, *usual_path]
    sys.argv = [first, *arguments[not is_file :]]
    if first == "-c":
        exec(arguments[0], {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def _end(problem: BaseException | None) -> NoReturn:
    """End as an interpreter does, but for taking every loaded module apart, which takes ten times as long as all else."""
    code = 0
    if isinstance(problem, SystemExit):
        code = problem.code if isinstance(problem.code, int) else int(problem.code is not None)
        if isinstance(problem.code, str):
            print(problem.code, file=sys.stderr)
    elif problem is not None:
        sys.excepthook(type(problem), problem, problem.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:  # as Python does it
        code = 120
    with suppress(OSError):
        sys.stderr.flush()
    if isinstance(problem, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    _usual_path = [entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:] = [str(ROOT), *_usual_path]
    _order = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(_order)
    try:
        _run(_order["script"], _order["cwd"], _usual_path)
    except BaseException as _problem:  # noqa: BLE001 - it ends the process, as it would end any
        _end(_problem)
    _end(None)
