"""Logging set-up: one line per event, no secrets, no control characters."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

FORMAT = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
MAX_LOG_BYTES, KEPT_LOGS = 10_000_000, 5

_CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s]*@", re.IGNORECASE)
# Libraries that may log addresses or documents; theirs are not our lines.
_QUIET = ("pymongo", "asyncio", "aiohttp", "urllib3", "filelock", "openai", "httpx2", "httpcore2", "chromadb")


class SafeFormatter(logging.Formatter):
    """Formats a record as one line without credentials in URLs, *secrets*, or control characters."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__(FORMAT)
        self._secrets = [secret for secret in secrets if secret]

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback becomes part of it, its line ends escaped."""
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, "***")
        line = _CREDENTIALS.sub(r"\g<scheme>***@", line)
        if line.isprintable():
            return line
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: a progress bar replaces it while it is drawn."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record to the current stderr."""
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(
    level: str,
    *,
    to_stderr: bool = True,
    file: Path | None = None,
    secrets: Iterable[str] = (),
    stderr_level: str | None = None,
) -> None:
    """Send log lines of *level* and above to stderr and, rotated, to *file*; neither is needed.

    *stderr_level* is for stderr alone; None: *level*. Replaces what an earlier call set up. Call it once, from an entry
    point.

    Raises:
        OSError: *file* cannot be written; nothing was changed.
    """
    to_file: list[logging.Handler] = []
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file.append(RotatingFileHandler(file, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8"))
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if to_stderr:
        handlers.append(StderrHandler())
        handlers[0].setLevel(stderr_level or logging.NOTSET)
    handlers += to_file
    formatter = SafeFormatter(list(secrets))
    for handler in handlers or [logging.NullHandler()]:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
