"""The server's own log lines, in our form and without what callers sent."""

from __future__ import annotations

import logging
import traceback


class WithoutMessages(logging.Filter):
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
