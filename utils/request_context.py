"""The id of the request in hand: in its answer, in each log line, and in the call to the model server."""

from __future__ import annotations

import logging
import re
import secrets
from contextvars import ContextVar

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
