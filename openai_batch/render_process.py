"""Runs users' templates and functions in a child process with limits of time and memory.

Neither a sandbox nor ``except`` ends an endless loop, ``{{ 'x' * 10 ** 9 }}`` or a crash in C. The kernel does: it ends
the child, and with it one document. The child is forked, because lambdas cannot be passed to it in another way, and
it is forked again after each death. It closes the parent's files, drops the product's settings from its environment,
and ends when the parent does. Values travel as BSON. Needs fork; memory is limited on Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self

from config.settings import forget_settings, known_environment_names
from error_handler import JobProcessingError, JobTemplateError
from storage.extended_json import bson_decode, bson_encode

TIME_LIMIT_S = 2.0  # per document
MEMORY_BYTES = 100_000_000  # per document ...
MEMORY_PER_BYTE = 16  # ... and this much more for each byte of it
TOTAL_MEMORY_BYTES = 1_000_000_000  # that may accumulate over many documents
MAX_REPLY_BYTES = 20_000_000  # more fits in no document
GRACE_S = 2.0  # by which the parent waits longer than the child's own timer
MAX_DEATHS_IN_A_ROW = 20

Function = Callable[[Any], Any]

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, prctl(2)
_TIMED_OUT = -signal.SIGALRM


class RenderProcess:
    """Calls functions in a child process. Use in ``with``; calls from several threads wait for each other."""

    def __init__(self, make: Callable[[], Mapping[str, Function]]) -> None:
        """Start the child; *make* runs there and returns the functions by the names that errors use.

        Raises JobTemplateError if *make* raised it, or took longer than TIME_LIMIT_S.
        """
        self._make = make
        self._lock = threading.Lock()
        self._is_closed = False
        self._child = self._deaths = 0
        known_environment_names()  # kept for each child; the first call imports modules, which takes 40 ms
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, after a call in progress; later calls fail."""
        self._is_closed = True  # before the lock, so that a thread with many calls lets it go
        with self._lock:
            self._end()

    def call(self, name: str, value: Mapping[str, Any]) -> Any:
        """Return what function *name* returns for *value*, as BSON carries it.

        Raises JobProcessingError if it raised that, exceeded a limit, or ended the child, which is replaced;
        JobTemplateError if the child died MAX_DEATHS_IN_A_ROW times, or cannot be replaced.
        """
        frame = bson_encode({"name": name, "value": value})
        with self._lock:
            if self._is_closed:
                raise JobProcessingError(f"{name} is not called any more: the job has ended")
            reply = self._exchange(frame)
            if reply is None:
                status = self._replace()
                if status != _TIMED_OUT:  # the system may have killed it for its memory: try the document once more
                    reply = self._exchange(frame)
                    status = self._replace() if reply is None else status
            if reply is None:
                self._deaths += 1
                if self._deaths >= MAX_DEATHS_IN_A_ROW:
                    raise JobTemplateError(
                        f"{name} ended its process for {self._deaths} documents in a row; try --dry-run --limit 1."
                    )
                raise JobProcessingError(f"{name} {_cause_of(status)}", is_final=True)
            self._deaths = 0
        if "error" in reply:
            raise JobProcessingError(reply["error"], is_final=reply["is_final"])
        return reply["value"]

    def _exchange(self, frame: bytes | None = None) -> dict[str, Any] | None:
        """Send *frame*; return what the child sends, None if it is dead or sends nothing in time."""
        try:
            if frame is not None:
                self._channel.send_bytes(frame)
            is_there = self._channel.poll(TIME_LIMIT_S + GRACE_S)
            return bson_decode(self._channel.recv_bytes(MAX_REPLY_BYTES)) if is_there else None
        except (OSError, EOFError):
            return None

    def _replace(self) -> int:
        """Start another child; return the exit status of the old one, negative for a signal."""
        status = self._end()
        self._start()
        return status

    def _start(self) -> None:
        parent = os.getpid()
        self._channel, far_end = Pipe()
        with far_end, warnings.catch_warnings():
            # Python 3.12 warns of forks in a process with threads, whose locks stay locked in the child. The child uses none of
            # them; if it hangs anyway, the time limit ends it.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._child = os.fork()
            except OSError as exc:
                raise JobTemplateError(f"no process for the templates can be started ({exc.strerror}).") from exc
            if self._child == 0:
                try:
                    _isolate(far_end.fileno(), parent)
                    _serve(far_end, self._make)
                finally:
                    os._exit(0)
        too_much = f"the templates exceed {TIME_LIMIT_S:g} s or the memory limit when they are parsed."
        hello = self._exchange() or {"problem": too_much}
        if hello["problem"] is not None:
            self._end()
            raise JobTemplateError(hello["problem"])

    def _end(self) -> int:
        """End the child, if there is one; return its exit status, negative for a signal."""
        child, self._child = self._child, 0
        if not child:
            return 0
        self._channel.close()
        try:
            os.kill(child, signal.SIGKILL)  # a dead child keeps its first status until it is collected here
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except (ProcessLookupError, ChildProcessError):  # the parent ignores SIGCHLD: the kernel has collected it
            return -signal.SIGKILL


def _cause_of(status: int) -> str:
    if status in (_TIMED_OUT, -signal.SIGKILL):
        return f"takes longer than {TIME_LIMIT_S:g} s or too much memory"
    return f"ended its process ({signal.Signals(-status).name if status < 0 else f'exit code {status}'})"


def _isolate(channel: int, parent: int) -> None:
    """Detach the child from everything of the parent but the descriptor *channel*."""
    gc.freeze()  # collecting the parent's objects would close descriptors that have been reused
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the parent decides when to stop
    for number in (signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    sys.stdout = sys.stderr  # output of functions must not mix with the lines of --json
    os.closerange(3, channel)  # an inherited lock would outlive the parent
    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))
    if sys.platform == "linux":
        # Linux also sends it when the forking thread ends; the next call then starts another child.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(0)
    forget_settings()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(channel: Connection, make: Callable[[], Mapping[str, Function]]) -> None:
    """Reply to each frame until the parent closes the channel."""
    most = _address_space() + TOTAL_MEMORY_BYTES
    functions: Mapping[str, Function] = {}
    problem = None
    try:
        with _limits(0, most):
            functions = make()
    except JobTemplateError as exc:
        problem = str(exc)
    channel.send_bytes(bson_encode({"problem": problem}))
    while True:
        try:
            frame = channel.recv_bytes()
        except EOFError:
            return
        reply, name = None, "the function"
        try:
            with _limits(len(frame), most):
                request = bson_decode(frame)
                name = request["name"]
                reply = _reply(functions[name], request["value"], name)
        finally:
            if reply is None:  # any other exception: tell the parent its name, then end this process
                kind = sys.exc_info()[0]
                reply = _error(f"{name} failed ({kind.__name__ if kind else 'end'})")
            channel.send_bytes(reply)


def _reply(function: Function, value: Any, name: str) -> bytes:
    try:
        reply = bson_encode({"value": function(value)})
    except JobProcessingError as exc:
        return _error(str(exc), is_final=exc.is_final)
    except MemoryError:
        return _error(f"{name} takes more than {MEMORY_BYTES // 10**6} MB of memory")
    except ValueError:
        return _error(f"{name} returns a value that MongoDB cannot store")
    return reply if len(reply) <= MAX_REPLY_BYTES else _error(f"{name} returns more than {MAX_REPLY_BYTES // 10**6} MB")


def _error(text: str, *, is_final: bool = True) -> bytes:
    return bson_encode({"error": text, "is_final": is_final})


@contextlib.contextmanager
def _limits(size: int, most: int) -> Iterator[None]:
    """Limit the block to TIME_LIMIT_S and to the memory of a document of *size* bytes."""
    used = _address_space()
    if used:
        wanted = used + MEMORY_BYTES + MEMORY_PER_BYTE * size
        resource.setrlimit(resource.RLIMIT_AS, (min(wanted, most), most))
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)  # SIGALRM ends the process, even inside C code
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _address_space() -> int:
    """Return the bytes of address space in use, 0 on systems without /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
