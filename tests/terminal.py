"""A pseudo terminal for programs that tests start. No output is lost, and no part of it depends on timing."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tests.forked_process import ForkedProcess

STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
END_S = 90.0
_END = b"\0end of output\0"


class Terminal:
    """A terminal of *columns* x *lines*; give *inner* to a process as its streams. Use as ``with``.

    *inner* stays open here and the end of the output is marked, so nothing depends on how the kernel reports that nobody
    has the terminal open any more.
    """

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self._ours, self.inner = pty.openpty()
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._ours)
        os.close(self.inner)

    def shown_until_end_of(self, process: ForkedProcess, answers: Sequence[tuple[str, str]] = ()) -> str:
        """Return what *process* shows until it ends.

        Of *answers*, pairs of a text and keys, each is typed as soon as its text is shown; Ctrl-C is ``\\x03``.
        """
        shown, start, waiting = b"", 0, list(answers)
        handle = os.pidfd_open(process.pid)
        try:
            while handle not in (ready := self._ready(handle, shown)) or self._ours in ready:
                shown += os.read(self._ours, 65536)
                if waiting and waiting[0][0] in STEERING.sub("", shown[start:].decode(errors="ignore")):
                    start = len(shown)
                    os.write(self._ours, waiting.pop(0)[1].encode())
        finally:
            os.close(handle)
        os.write(self.inner, _END)
        while not shown.endswith(_END):
            self._ready(self._ours, shown)
            shown += os.read(self._ours, 65536)
        return shown.removesuffix(_END).decode()

    def _ready(self, handle: int, shown: bytes) -> list[int]:
        """Return which of the terminal and *handle* are readable."""
        ready = select.select([self._ours, handle], [], [], END_S)[0]
        assert ready, shown.decode(errors="replace")
        return ready
