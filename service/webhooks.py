"""Webhooks of jobs: signed as Standard Webhooks (https://www.standardwebhooks.com), to origins of the operator only."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

import aiohttp

from error_handler import JobConnectionError, JobValidationError
from network.guarded_resolver import GuardedResolver
from network.outgoing import aiohttp_session, problem_of, route_to

TIMEOUT_S = 10.0  # from the lookup of the name to the status
GONE = 410  # the receiver wants no more
MAX_URL_CHARACTERS = 2000

# What may follow an origin. Nothing in it can change the host, so no parser has to be trusted.
_REST = r"([/?][!\"$-\[\]-~]*)?"


def url_pattern(origins: Iterable[str]) -> str:
    """Return the regular expression of the URLs that a job may name: those of *origins*, at least one."""
    return f"^({'|'.join(map(re.escape, origins))}){_REST}$"


def signature(key: bytes, message_id: str, at: int, body: bytes) -> str:
    """Return the header ``webhook-signature`` of *body*, sent *at* (unix seconds)."""
    digest = hmac.new(key, f"{message_id}.{at}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


async def send_webhook(url: str, key: bytes, message_id: str, body: bytes) -> None:
    """Post *body*, JSON, to *url*.

    Raises JobConnectionError if another attempt may succeed; JobValidationError if the receiver is gone for good, or its
    address is not allowed.
    """
    at = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": signature(key, message_id, at, body),
    }
    connector = aiohttp.TCPConnector(resolver=GuardedResolver(), use_dns_cache=False, force_close=True)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp_session(connector) as session,
            session.post(url, data=body, headers=headers, timeout=timeout, **route_to(url).options) as answer,
        ):
            status = answer.status
            answer.close()  # the body is not read
    except (aiohttp.ClientError, OSError, ValueError) as exc:  # a timeout is an OSError
        # Only the class: the error's text holds the URL, and URLs hold tokens.
        raise JobConnectionError(problem_of(exc, url) or f"no response ({type(exc).__name__})") from exc
    if status == GONE:
        raise JobValidationError("the receiver wants no more (HTTP 410)")
    if not 200 <= status < 300:
        raise JobConnectionError(f"HTTP {status}")


def host_of(url: str) -> str:
    """Return the host of *url*, for logs: the rest may hold a token."""
    return urlsplit(url).hostname or ""
