"""Logging set-up: one line per event, no secrets, no control characters."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import traceback
from collections.abc import Iterable
from contextvars import ContextVar
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


REQUEST_ID_HEADER = "X-Request-ID"

_SANE = re.compile(rb"[A-Za-z0-9._-]{1,64}")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def begin_request(proposed: bytes | None) -> str:
    """Make *proposed* the id of this task's request, or a new one where it is missing or not sane; return it."""
    sane = proposed is not None and _SANE.fullmatch(proposed)
    chosen = proposed.decode() if sane and proposed is not None else secrets.token_hex(16)
    request_id.set(chosen)
    return chosen


class RequestIdFilter(logging.Filter):
    """Appends the request id to the message of each record that belongs to a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; keep all of them."""
        current = request_id.get()
        if current is not None:
            record.msg = f"{record.msg} request_id={current}"
        return True


class TracebackRedactor(logging.Filter):
    """Replaces a traceback by the type of the exception and the lines of code: its message may quote a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; keep all of them."""
        if record.exc_info and record.exc_info[1] is not None:
            exc = record.exc_info[1]
            frames = traceback.extract_tb(exc.__traceback__)[-6:]
            where = ", ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)
            record.msg, record.args = f"{type(exc).__name__} at {where}", ()
            record.exc_info = record.exc_text = None
        return True


def adopt_server_logs() -> None:
    """Send uvicorn's lines where ours go, except the access lines: they hold paths and queries as they were sent."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers = []
        log.propagate = name != "uvicorn.access"
