"""A measured process: start, CPU time, peak memory and exit. Linux only."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config.settings import known_environment_names

SAMPLE_S = 0.02
# Removed, because with it every start compiles the product's modules again, unlike in an installation.
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class WorkerFailedError(Exception):
    """A measured process failed, so its figures are invalid; the message quotes its stderr."""


@dataclass(frozen=True)
class Usage:
    """Resource usage of a process from start to exit; user and system time of all threads."""

    exit_code: int
    wall_s: float
    cpu_s: float


class WorkerProcess:
    """A Python process in *folder* without the product's environment variables; killed on leaving ``with``.

    ``start_s`` is a ``time.monotonic`` reading just before it was started.
    """

    def __init__(self, arguments: Sequence[str | Path], folder: Path) -> None:
        self.folder = folder
        self.peak_mb = 0.0
        self._log = folder / "stderr.txt"
        unwanted = known_environment_names() | {NO_BYTECODE}
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        with self._log.open("wb") as stderr, (folder / "stdout.txt").open("wb") as stdout:
            self.start_s = time.monotonic()
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment, stdout=stdout, stderr=stderr
            )
        self._handle = os.pidfd_open(self._process.pid)
        self._usage: Usage | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._handle)

    @property
    def has_ended(self) -> bool:
        """True if the process has exited."""
        return self._usage is not None or bool(select.select([self._handle], [], [], 0)[0])

    @property
    def cpu_s(self) -> float:
        """User and system time of all threads so far, in seconds."""
        # The clock id of another process, computed like clock_getcpuclockid(3).
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def sample_peak(self) -> float:
        """Read and return the peak resident memory so far, in MB of 2**20 bytes.

        Not ru_maxrss: for a child, Linux initialises it with the size of the parent.
        """
        found = _HIGH_WATER.search(Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii"))
        if found:  # an exited process has no entry
            self.peak_mb = max(self.peak_mb, int(found.group(1)) / 1024)
        return self.peak_mb

    def wait(self, timeout_s: float) -> Usage:
        """Wait for the exit, sample the peak memory, and return the usage.

        Raises:
            WorkerFailedError: It did not exit in time, or not with exit code 0.
        """
        deadline = time.monotonic() + timeout_s
        while not select.select([self._handle], [], [], SAMPLE_S)[0]:
            self.sample_peak()
            if time.monotonic() > deadline:
                raise WorkerFailedError(f"it did not end within {timeout_s:.0f} s: {self.last_words()}")
        usage = self._reap()
        if usage.exit_code != 0:
            raise WorkerFailedError(f"it ended with exit code {usage.exit_code}: {self.last_words()}")
        return usage

    def kill(self) -> Usage:
        """Kill the process if it is running, and return its usage."""
        if self._usage is None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)  # Popen.kill would lose the usage
        return self._reap()

    def last_words(self) -> str:
        """Return the end of its stderr."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def _reap(self) -> Usage:
        if self._usage is None:
            _, status, used = os.wait4(self._process.pid, 0)
            wall_s = time.monotonic() - self.start_s
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self._usage = Usage(self._process.returncode, wall_s, used.ru_utime + used.ru_stime)
        return self._usage
