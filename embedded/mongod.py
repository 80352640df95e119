"""A real mongod as a child process: the database of ``--embedded`` and of the tests."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedded.mongod_binary import FOLDER_IN_USE, PORT_IN_USE, bundled_libraries, explain_end, find_mongod
from embedded.mongod_command import error_name, is_primary, run_command
from error_handler import ConfigurationError

START_TIMEOUT_S = 120.0  # recovery after a crash replays the journal
STOP_TIMEOUT_S = 30.0
HOLDER_TIMEOUT_S = 2.0
POLL_S = 0.02
START_ATTEMPTS = 5
LOG_LIMIT_BYTES = 5_000_000

# Below the kernel's range for outgoing connections: a client that keeps calling a port of that range
# while its server is down can be connected to itself, and then the server never gets the port back.
PORTS = range(20_000, 32_000)

# Runs in the child: die with the parent, even if that is killed. A preexec_fn would do it in a copy of
# a process with threads, which can deadlock.
_LAUNCHER = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class EmbeddedMongod:
    """A mongod on 127.0.0.1 that lives no longer than this process; use it in ``with``.

    It has no access control: whoever may run programs on this machine can read it.

    Args:
        data_dir: Its data; made when missing, then readable by its owner only. Kept when it stops.
        port: 0 takes a free one at the first start and keeps it.
        replica_set: Name of a replica set of one; None gives a standalone server. A folder that was
            served on another port is adapted to the new one.
        log_path: Where the server's own log goes; None means ``mongod.log`` in *data_dir*.
        extra_arguments: Added to mongod's command line.
        binary: The mongod to run; None means the one of ``find_mongod``.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        replica_set: str | None = None,
        log_path: Path | None = None,
        extra_arguments: Sequence[str] = (),
        binary: Path | None = None,
    ) -> None:
        self._data_dir = data_dir.absolute()
        self._port = port
        self._replica_set = replica_set
        self._log_path = (log_path or data_dir / "mongod.log").absolute()
        self._extra_arguments = tuple(extra_arguments)
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread()
        self._log_start = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port it listens on; 0 before the first start where none was given."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._process.pid if self._process and self._keeper.is_alive() else None

    @property
    def uri(self) -> str:
        """Its connection string; valid from the first start on."""
        return f"mongodb://127.0.0.1:{self._port}/" + (f"?replicaSet={self._replica_set}" if self._replica_set else "")

    def start(self) -> None:
        """Start it and return when it takes commands (writes too); does nothing while it runs.

        Raises:
            ConfigurationError: It cannot run here, or not with this folder or port. Nothing is left running.
        """
        if self.pid is not None:
            return
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._data_dir.chmod(0o700)
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            if self._log_path.is_file() and self._log_path.stat().st_size > LOG_LIMIT_BYTES:
                self._log_path.replace(f"{self._log_path}.1")
        except OSError as exc:
            raise ConfigurationError(
                f"The folder for MongoDB's data cannot be used ({exc}); choose another or correct its rights."
            ) from exc
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            self._start_server()
            if self._replica_set:
                self._await_primary(self._replica_set)
            undo.pop_all()

    def stop(self) -> None:
        """End it cleanly, or with SIGKILL after 30 s; does nothing when it does not run."""
        self._signal(signal.SIGTERM, STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End it at once with SIGKILL, as a crash would."""
        self._signal(signal.SIGKILL, STOP_TIMEOUT_S)

    def restart(self) -> None:
        """Stop it, then start it with the same port and data."""
        self.stop()
        self.start()

    def _signal(self, number: signal.Signals, timeout_s: float) -> None:
        if self._process and self._keeper.is_alive():
            self._process.send_signal(number)
            self._keeper.join(timeout_s)

    def _start_server(self) -> None:
        binary = self._binary or find_mongod()
        log = ""
        with tempfile.TemporaryDirectory() as folder:  # the loader needs it only until the server is up
            libraries = ""
            for _ in range(START_ATTEMPTS):
                port = self._port or _free_port()
                self._spawn(binary, port, libraries)
                is_up, log = self._follow_log(port)
                if is_up:
                    self._port = port
                    return
                if not libraries and (libraries := bundled_libraries(log, Path(folder))):
                    continue
                port_was_taken = self._port == 0 and PORT_IN_USE in log
                if not port_was_taken and not (FOLDER_IN_USE in log and self._holder_ends()):
                    break
        code = self._process.returncode if self._process else None
        raise ConfigurationError(
            explain_end(log, code, data_dir=self._data_dir, port=port, holder=self._holder(), log_path=self._log_path)
        )

    def _spawn(self, binary: Path, port: int, libraries: str) -> None:
        command = [str(binary), "--dbpath", str(self._data_dir), "--port", str(port), "--bind_ip", "127.0.0.1"]
        command += ["--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--slowms", "86400000"]  # the log of a slow command quotes the document
        if self._replica_set:
            command += ["--replSet", self._replica_set, "--oplogSize", "256"]
        command += self._extra_arguments
        if libraries:
            command = ["env", f"LD_LIBRARY_PATH={libraries}", *command]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        started = threading.Event()
        failures: list[OSError] = []

        def keep(log: int) -> None:
            # The kernel counts the end of the thread that forked as the end of the parent, so the
            # thread stays as long as the child. A session of its own keeps Ctrl-C from the server
            # while the results of calls in flight are still being written.
            try:
                self._process = subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as exc:
                failures.append(exc)
                return
            finally:
                os.close(log)
                started.set()
            self._process.wait()

        try:
            log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as exc:
            raise ConfigurationError(f"MongoDB's log cannot be written ({exc}); correct its rights.") from exc
        self._log_start = os.fstat(log).st_size
        self._keeper = threading.Thread(target=keep, args=(log,), name="embedded-mongod", daemon=True)
        self._keeper.start()
        started.wait()
        if failures:
            raise ConfigurationError(f"{binary} cannot be started ({failures[0]}); install it again.") from failures[0]

    def _follow_log(self, port: int) -> tuple[bool, str]:
        """Wait until the server listens (True) or has ended (False), and return what it logged."""
        # Not by calling the port: another server may hold it, and would answer in place of this one.
        listens = re.compile(rf"aiting for connections.*\b{port}\b")
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            has_ended = not self._keeper.is_alive()
            with self._log_path.open("rb") as file:
                file.seek(self._log_start)
                log = file.read().decode(errors="replace")
            if has_ended:
                return False, log
            if listens.search(log) and self._holder() == self.pid:
                return True, log
            self._keeper.join(POLL_S)
        raise ConfigurationError(f"mongod was not ready after {START_TIMEOUT_S:.0f} s; {self._log_path} says why.")

    def _holder(self) -> int | None:
        """Process id of the server that has, or last had, the data folder."""
        try:
            return int((self._data_dir / "mongod.lock").read_text())
        except (OSError, ValueError):
            return None

    def _holder_ends(self) -> bool:
        """Whether the server that has the folder is just ending: its own run was killed a moment ago."""
        holder = self._holder()
        if sys.platform != "linux" or not holder:
            return False
        try:
            handle = os.pidfd_open(holder)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([handle], [], [], HOLDER_TIMEOUT_S)[0])
        finally:
            os.close(handle)

    def _await_primary(self, name: str) -> None:
        config = {"_id": name, "version": 1, "members": [{"_id": 0, "host": f"127.0.0.1:{self._port}"}]}
        cures: dict[str, dict[str, Any]] = {
            "NotYetInitialized": {"replSetInitiate": config},
            "InvalidReplicaSetConfig": {"replSetReconfig": config, "force": True},  # it had another port
        }
        problem = "no answer"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._keeper.is_alive():
            with contextlib.suppress(OSError):
                if is_primary(run_command(self._port, {"hello": 1})):
                    return
                problem = error_name(run_command(self._port, {"replSetGetStatus": 1})) or "no election yet"
                if problem in cures:
                    run_command(self._port, cures[problem])
            self._keeper.join(POLL_S)
        raise ConfigurationError(
            f"mongod did not become primary of the replica set {name} ({problem}); {self._log_path} says why, "
            "and an empty data folder cures it if the old data is not needed."
        )


def _free_port() -> int:
    for _ in range(100):
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigurationError(f"No port between {PORTS.start} and {PORTS.stop} is free: name one that is.")
