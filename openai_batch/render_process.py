"""Templates and functions of users run in a process of their own, with limits of time and memory.

What neither a sandbox nor ``except`` ends (an endless loop, ``{{ 'x' * 10 ** 9 }}``, a crash in C) ends that process, and
with it one document. Two processes stand beside the parent::

    parent ──control──> keeper ──forks──> worker
       └───────────one document at a time────┘

The keeper is forked once and early, before there are threads, because lambdas can be handed over by fork only; from then
on it alone forks, one worker after the other. It holds no file, socket or lock of the parent, no setting of the product in
its environment, and ends when the parent does, however that ends. Documents and answers travel as BSON.
Needs a system with fork; memory is limited where there is /proc.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from config.child_environment import forget_settings
from error_handler import JobProcessingError, JobTemplateError
from storage.extended_json import bson_decode, bson_encode

TIME_LIMIT_S = 2.0  # of one document
MEMORY_BYTES = 100_000_000  # that one document may take ...
MEMORY_PER_BYTE = 16  # ... and for each byte of it
MEMORY_IN_ALL_BYTES = 1_000_000_000  # that may pile up over many documents
MAX_REPLY_BYTES = 20_000_000  # more fits in no document
GRACE_S = 2.0  # by which the parent waits longer than the worker's own clock
MOST_DEATHS_IN_A_ROW = 20

Function = Callable[[Any], Any]

_SIZE = struct.Struct("!I")
_STATUS = struct.Struct("!i")
_NO_WORKER = -1
_TIMED_OUT = -signal.SIGALRM


class RenderProcess:
    """Calls functions in a worker process. Use in ``with``; calls from several threads wait for each other."""

    def __init__(self, make: Callable[[], Mapping[str, Function]]) -> None:
        """Start the worker; *make* runs there and returns the functions by their names in errors.

        Raises:
            JobTemplateError: *make* raised it, or took longer than TIME_LIMIT_S.
        """
        self._make = make
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._keeper = 0
        self._deaths = 0
        try:
            self._replace()
        except JobTemplateError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both processes; without them, this does nothing."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._forget_keeper()

    def call(self, name: str, value: Mapping[str, Any]) -> Any:
        """Return what function *name* makes of *value*, as BSON carries it.

        Raises:
            JobProcessingError: It raised it, took too long or too much, or ended its process; the worker is new then.
            JobTemplateError: This happened MOST_DEATHS_IN_A_ROW times, so it is not the documents.
        """
        frame = bson_encode({"name": name, "value": value})
        with self._lock:
            reply = self._exchange(frame)
            if reply is None:
                status = self._replace()
                if status != _TIMED_OUT:  # perhaps the system wanted its memory: the document has a second chance
                    reply = self._exchange(frame)
                    status = self._replace() if reply is None else status
            if reply is None:
                self._count_death(name)
                raise JobProcessingError(f"{name} {_how_it_ended(status)}", is_final=True)
            self._deaths = 0
        if "error" in reply:
            raise JobProcessingError(reply["error"], is_final=reply["is_final"])
        return reply["value"]

    def _count_death(self, name: str) -> None:
        self._deaths += 1
        if self._deaths >= MOST_DEATHS_IN_A_ROW:
            raise JobTemplateError(
                f"{name} ended its process for {self._deaths} documents in a row; try it with --dry-run --limit 1."
            )

    def _exchange(self, frame: bytes) -> dict[str, Any] | None:
        """Return the worker's reply to *frame*, None where there is none in time."""
        assert self._channel is not None  # noqa: S101 - closed objects are not used
        try:
            self._channel.sendall(_SIZE.pack(len(frame)) + frame)
            answer = _receive(self._channel, MAX_REPLY_BYTES)
        except OSError:  # it is gone, or a time-out of the socket: the worker's own clock did not end it
            return None
        return None if answer is None else bson_decode(answer)

    def _replace(self) -> int:
        """End the worker, start another; return how the old one ended, as ``subprocess`` says it."""
        if self._channel is not None:
            self._channel.close()
        self._channel, far_end = socket.socketpair()
        self._channel.settimeout(TIME_LIMIT_S + GRACE_S)
        with far_end:
            try:
                status = self._ask_keeper(far_end)
            except OSError:  # the keeper itself was killed
                self._forget_keeper()
                status = self._ask_keeper(far_end)
        try:
            hello = _receive(self._channel, MAX_REPLY_BYTES)
        except OSError:
            hello = None
        if hello is None:
            raise JobTemplateError(
                f"the templates take longer than {TIME_LIMIT_S:g} s or too much memory to be parsed."
            )
        problem = bson_decode(hello).get("problem")
        if problem is not None:
            raise JobTemplateError(problem)
        return status

    def _forget_keeper(self) -> None:
        if self._control is not None:
            self._control.close()  # at the end of it the keeper ends its worker and itself
            self._control = None
            os.waitpid(self._keeper, 0)

    def _ask_keeper(self, far_end: socket.socket) -> int:
        if self._control is None:
            self._fork_keeper()
        assert self._control is not None  # noqa: S101 - set above
        socket.send_fds(self._control, [b"w"], [far_end.fileno()])
        status = _read(self._control, _STATUS.size)
        if status is None:
            raise ConnectionResetError
        return int(_STATUS.unpack(status)[0])

    def _fork_keeper(self) -> None:
        self._control, far_end = socket.socketpair()
        with far_end, warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads: their locks stay locked in the child. The child uses none of
            # them, and should it ever hang, the time limit ends it.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._keeper = os.fork()
            if self._keeper == 0:
                try:
                    _keep(far_end, self._make)
                finally:
                    os._exit(0)


def _how_it_ended(status: int) -> str:
    if status in (_TIMED_OUT, -signal.SIGKILL):
        return f"takes longer than {TIME_LIMIT_S:g} s or too much memory"
    return f"ended its process ({signal.Signals(-status).name if status < 0 else f'exit code {status}'})"


def _keep(control: socket.socket, make: Callable[[], Mapping[str, Function]]) -> None:
    """Be the keeper: a worker for each socket that comes, until the parent is gone."""
    # Objects of the parent are never collected here: closing their files would close other ones of the same number.
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all; the parent decides
    for number in (signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    sys.stdout = sys.stderr  # what functions print must not get between the lines of --json
    _close_files(control.fileno())
    forget_settings()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    worker = 0
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        status = _end(worker) if worker else _NO_WORKER
        if not message:
            return
        control.sendall(_STATUS.pack(status))
        worker = os.fork()
        if worker == 0:
            try:
                control.close()
                _work(socket.socket(fileno=sockets[0]), make)
            finally:
                os._exit(0)
        os.close(sockets[0])


def _end(worker: int) -> int:
    os.kill(worker, signal.SIGKILL)  # it is no other process: nobody but us takes its exit status
    return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])


def _close_files(keep: int) -> None:
    """Close every file but *keep* and the standard ones: a lock that is held here would outlive the parent."""
    limit = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, keep)
    os.closerange(keep + 1, limit)


def _work(channel: socket.socket, make: Callable[[], Mapping[str, Function]]) -> None:
    """Be the worker: one reply for each frame, until the socket is closed."""
    most = _address_space() + MEMORY_IN_ALL_BYTES
    try:
        with _limits(0, most):
            functions = make()
    except JobTemplateError as exc:
        _send(channel, bson_encode({"problem": str(exc)}))
        return
    _send(channel, bson_encode({}))
    while (frame := _receive(channel, 2**32)) is not None:
        reply = None
        name = "the function"
        try:
            with _limits(len(frame), most):
                request = bson_decode(frame)
                name = request["name"]
                reply = _reply(functions[name], request["value"], name)
        finally:
            if reply is None:  # whatever it raised, this process ends now
                kind = sys.exc_info()[0]
                reply = bson_encode({"error": f"{name} failed ({kind.__name__ if kind else 'end'})", "is_final": True})
            _send(channel, reply)


def _reply(function: Function, value: Any, name: str) -> bytes:
    try:
        reply = bson_encode({"value": function(value)})
    except JobProcessingError as exc:
        return bson_encode({"error": str(exc), "is_final": exc.is_final})
    except MemoryError:
        return bson_encode({"error": f"{name} takes more than {MEMORY_BYTES // 10**6} MB of memory", "is_final": True})
    except ValueError:
        return bson_encode({"error": f"{name} makes what MongoDB cannot hold", "is_final": True})
    if len(reply) > MAX_REPLY_BYTES:
        return bson_encode({"error": f"{name} makes more than {MAX_REPLY_BYTES // 10**6} MB", "is_final": True})
    return reply


@contextlib.contextmanager
def _limits(size: int, most: int) -> Iterator[None]:
    """Give the block TIME_LIMIT_S, and the memory that a document of *size* bytes may take."""
    used = _address_space()
    if used:
        wanted = used + MEMORY_BYTES + MEMORY_PER_BYTE * size
        resource.setrlimit(resource.RLIMIT_AS, (min(wanted, most), most))
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)  # the kernel ends the process, whatever it is in
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _address_space() -> int:
    """Return the bytes of address space that this process has, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _send(channel: socket.socket, frame: bytes) -> None:
    channel.sendall(_SIZE.pack(len(frame)) + frame)


def _receive(channel: socket.socket, most: int) -> bytes | None:
    """Return the next frame, None at the end or where it is longer than *most* bytes."""
    header = _read(channel, _SIZE.size)
    size = _SIZE.unpack(header)[0] if header else most + 1
    return _read(channel, size) if size <= most else None


def _read(channel: socket.socket, size: int) -> bytes | None:
    received = bytearray(size)
    view, done = memoryview(received), 0
    while done < size:
        count = channel.recv_into(view[done:])
        if not count:
            return None
        done += count
    return bytes(received)
