"""Progress of a job on stderr: a live display on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

LINE_EVERY_S = 5.0
SHOWN = 8  # subjects on a terminal, the last changed ones


class JobProgress:
    """Shows texts such as ``shard 3: in_progress, 5 of 10 done``. Use in ``with``, and call it.

    The part before the colon is the subject. A terminal shows the last text of each subject. Elsewhere a new text is
    printed if the last line is LINE_EVERY_S old; the final text is always printed.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._clock = clock
        self._texts: dict[str, str] = {}
        self._written = self._last = ""
        self._written_at = -LINE_EVERY_S
        self._live: Live | None = None

    def __enter__(self) -> JobProgress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self._write()

    def __call__(self, text: str) -> None:
        """Show *text*."""
        subject = text.partition(":")[0]
        self._texts.pop(subject, None)
        self._texts[subject] = self._last = text
        if len(self._texts) > SHOWN:
            del self._texts[next(iter(self._texts))]
        if self._live is not None:
            self._live.update(Group(*(Text(shown) for shown in self._texts.values())))
        elif self._clock() - self._written_at >= LINE_EVERY_S:
            self._write()

    def _write(self) -> None:
        if self._last != self._written:
            self._written, self._written_at = self._last, self._clock()
            self._console.print(Text(self._last))
