"""Single keys from a terminal or a pipe, without blocking the event loop."""

from __future__ import annotations

import codecs
import os
import re
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from utils.process import wait_for_input

END, ENTER, TAB, ERASE = "", "\n", "\t", "\x7f"
_SEQUENCE = re.compile(r"\x1b(?:[\[O][0-9;]*[A-Za-z~]|.)?", re.DOTALL)  # of arrow keys and the like


@contextmanager
def keys_of_stdin() -> Iterator[Keyboard]:
    """Yield the keys of stdin. A terminal gives each key at once and does not show it, until the end of the block."""
    descriptor = sys.stdin.fileno()
    if not os.isatty(descriptor):
        yield Keyboard(descriptor)
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield Keyboard(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Keyboard:
    """Reads the keys that arrive at a file *descriptor*."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._has_ended = False

    async def key(self) -> str:
        """Return the next key: a character, ENTER, TAB, ERASE, or END if there are no more."""
        while not self._pending and not self._has_ended:
            await wait_for_input(self._descriptor)
            data = os.read(self._descriptor, 1024)
            self._has_ended = not data
            text = _SEQUENCE.sub("", self._decoder.decode(data, final=not data))
            self._pending += text.replace("\r", ENTER).replace("\b", ERASE)
        first, self._pending = self._pending[:1], self._pending[1:]
        return first

    async def line(self) -> str:
        """Return the text up to the next ENTER or the end; it is shown on stdout as it is typed."""
        text = ""
        while (key := await self.key()) not in (END, ENTER):
            if key == ERASE and text:
                text = text[:-1]
                sys.stdout.write("\b \b")
            elif key.isprintable():
                text += key
                sys.stdout.write(key)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return text.strip()
