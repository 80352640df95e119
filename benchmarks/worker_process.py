"""One measured process: its start, its processor time, its peak memory, its end. Linux only."""

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
# With it, each start compiles every module of ours anew, and those of libraries do not: an installation keeps both.
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class WorkerFailedError(Exception):
    """A measured process ended in a way that makes its numbers worthless; the message quotes its stderr."""


@dataclass(frozen=True)
class Usage:
    """What a process has used: from its start to its end, user and system time of all its threads."""

    exit_code: int
    wall_s: float
    cpu_s: float


class WorkerProcess:
    """A Python process started in *folder*, without the settings of the environment; killed on leaving ``with``.

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
        """Whether it has come to its end, by itself or not."""
        return self._usage is not None or bool(select.select([self._handle], [], [], 0)[0])

    @property
    def cpu_s(self) -> float:
        """User and system time of all its threads so far, in seconds, to the nanosecond."""
        # The clock id of another process, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def sample_peak(self) -> float:
        """Read, keep and return the most memory it has had resident so far, in MB of 2**20 bytes.

        Not ru_maxrss: Linux starts that of a child at the size of the process that started it.
        """
        found = _HIGH_WATER.search(Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii"))
        if found:  # a process that has ended has no memory
            self.peak_mb = max(self.peak_mb, int(found.group(1)) / 1024)
        return self.peak_mb

    def wait(self, timeout_s: float) -> Usage:
        """Wait for its end, with the peak memory sampled meanwhile, and return what it has used.

        Raises:
            WorkerFailedError: It did not end in time, or not with exit code 0.
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
        """End it with SIGKILL where it still runs, and return what it has used."""
        if self._usage is None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)  # Popen.kill would reap it without its usage
        return self._reap()

    def last_words(self) -> str:
        """The end of its stderr."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def _reap(self) -> Usage:
        if self._usage is None:
            _, status, used = os.wait4(self._process.pid, 0)
            wall_s = time.monotonic() - self.start_s
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self._usage = Usage(self._process.returncode, wall_s, used.ru_utime + used.ru_stime)
        return self._usage
