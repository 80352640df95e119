"""Logging: one line per event, without secrets and control characters."""

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
# Libraries whose log lines may hold addresses or documents.
_QUIET = ("pymongo", "asyncio", "aiohttp", "urllib3", "filelock", "openai", "httpx2", "httpcore2", "chromadb")


class SafeFormatter(logging.Formatter):
    """Formats a record as one line, without *secrets*, credentials in URLs, and control characters."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__(FORMAT)
        self._secrets = [secret for secret in secrets if secret]

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with the traceback in it; line ends are escaped."""
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, "***")
        if "://" in line:
            line = _CREDENTIALS.sub(r"\g<scheme>***@", line)
        if line.isprintable():
            return line
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record to the current stderr."""
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(
    level: str, *, file: Path | None = None, secrets: Iterable[str] = (), stderr_level: str | None = None
) -> None:
    """Send log lines of *level* and above to stderr and to the rotated *file*. Call it once, from an entry point.

    *stderr_level* applies to stderr only; None means *level*. The handlers of an earlier call are replaced.

    Raises:
        OSError: *file* cannot be written. Nothing was changed.
    """
    handlers: list[logging.Handler] = [StderrHandler()]
    handlers[0].setLevel(stderr_level or logging.NOTSET)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(RotatingFileHandler(file, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8"))
    formatter = SafeFormatter(secrets)
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


REQUEST_ID_HEADER = "X-Request-ID"

_SANE = re.compile(rb"[A-Za-z0-9._-]{1,64}")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def begin_request(proposed: bytes | None) -> str:
    """Set and return the request id of this task: *proposed*, or a new one if it is missing or malformed."""
    chosen = proposed.decode() if proposed and _SANE.fullmatch(proposed) else secrets.token_hex(16)
    request_id.set(chosen)
    return chosen


class RequestIdFilter(logging.Filter):
    """Appends the request id to the message of each record that belongs to a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; keep every record."""
        current = request_id.get()
        if current is not None:
            record.msg = f"{record.msg} request_id={current}"
        return True


class TracebackRedactor(logging.Filter):
    """Replaces a traceback by the exception type and code lines, because its message may quote a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; keep every record."""
        if record.exc_info and record.exc_info[1] is not None:
            exc = record.exc_info[1]
            frames = traceback.extract_tb(exc.__traceback__)[-6:]
            where = ", ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)
            record.msg, record.args = f"{type(exc).__name__} at {where}", ()
            record.exc_info = record.exc_text = None
        return True


def adopt_server_logs() -> None:
    """Send uvicorn's lines to our handlers, except access lines, which hold paths and queries as sent."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers = []
        log.propagate = name != "uvicorn.access"
