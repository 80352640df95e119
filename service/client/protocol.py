"""What clients of the REST service send and how they read its answers. Pure: no I/O, no clock of its own."""

from __future__ import annotations

import email.utils
import hashlib
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from domain.text import one_line
from error_handler import ConfigurationError, ErrorKind, RequestError
from service import errors as service_errors

MAX_ANSWER_BYTES = 33_554_432  # the service takes at most half of it, and sends the messages back
LABELS = ("intent", "topic", "sentiment", "categorization")

# Another attempt can help; with the same Idempotency-Key it never asks the model twice for one answer.
REPEATED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# Nothing that a conversation holds causes these, so all others would get the same.
_SET_UP_WRONG = {
    401: "the service refuses the key; name the file with the right one by --api-key-file",
    403: "the service, or something before it, refuses access; check --url and the key",
    404: "there is no /classify at this address; check --url",
    405: "there is no POST /classify at this address; check --url",
    421: "the service does not answer to this host name without keys; use 127.0.0.1 in --url, or give the service API_KEYS",
}
_KNOWN_TYPES = frozenset(kind.name for kind in vars(service_errors).values() if isinstance(kind, ErrorKind))


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """Where the service is, and who asks; *url* has no slash at its end, *headers* hold the key."""

    url: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """One conversation ready to be sent; *key* is the SHA-256 of *body*."""

    number: str
    body: bytes
    key: bytes

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with *body*, in every attempt the same."""
        return {"Content-Type": "application/json", "Idempotency-Key": self.key.hex()}


def service_target(url: str, api_key: str | None = None, api_key_file: Path | None = None) -> ServiceTarget:
    """Return the target that command-line arguments name; a file wins over the bare key.

    Raises:
        ConfigurationError: The address or the key cannot be one, or the file cannot be read.
    """
    form = "--url must be http(s)://host[:port][/path], without user name, password or query"
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as exc:
        raise ConfigurationError(f"{form}.") from exc
    if not is_usable or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(f"{form}.")
    if api_key_file is not None:
        try:
            api_key = api_key_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"{api_key_file} cannot be read; name a file that holds the key alone.") from exc
    if api_key is None:
        return ServiceTarget(url.rstrip("/"), {})
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigurationError(
            "The API key must be printable ASCII without spaces; check --api-key-file or --api-key."
        )
    return ServiceTarget(url.rstrip("/"), {"Authorization": f"Bearer {api_key}"})


def build_request(number: str, messages: list[dict[str, str]]) -> ServiceRequest:
    """Return the request for one conversation; the same content makes the same key.

    Raises:
        RequestError: A text holds half of a surrogate pair, which JSON cannot carry.
    """
    try:
        body = orjson.dumps({"conversation_number": number, "messages": messages})
    except orjson.JSONEncodeError as exc:
        kind = ErrorKind("TextError", 0, "A text holds half of a surrogate pair; mend the file it comes from.")
        raise RequestError(kind) from exc
    return ServiceRequest(number, body, hashlib.sha256(body).digest())


def parse_answer(request: ServiceRequest, status: int, body: bytes, retry_after_s: float | None) -> dict[str, Any]:
    """Return the service's answer to *request*.

    Raises:
        RequestError: The service refuses or failed this conversation; the message holds nothing of it.
        ConfigurationError: The service would refuse every conversation.
    """
    if status == HTTPStatus.OK:
        return _parse_success(request, body)
    if 300 <= status < 400:
        raise ConfigurationError(f"The service redirects (status {status}); give the final address by --url.")
    if status in _SET_UP_WRONG:
        raise ConfigurationError(f"Status {status}: {_SET_UP_WRONG[status]}.")
    raise RequestError(
        _parse_error(status, body), retry_after_s=None if retry_after_s is None else math.ceil(retry_after_s)
    )


def _parse_success(request: ServiceRequest, body: bytes) -> dict[str, Any]:
    kind = ErrorKind(
        "ForeignAnswerError", 200, "The answer is not one of this service; check --url, and what is between."
    )
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestError(kind) from exc
    labels = answer.get("classification") if isinstance(answer, dict) else None
    if not isinstance(labels, dict) or not all(isinstance(labels.get(name), str) for name in LABELS):
        raise RequestError(kind)
    if answer.get("conversation_number") != request.number:  # a cache between that knows no bodies
        raise RequestError(kind)
    return dict(answer)


def _parse_error(status: int, body: bytes) -> ErrorKind:
    """Return what the body says, where it is the service's own: another server may quote what it was sent."""
    try:
        error = orjson.loads(body)["error"]
        name, message = str(error["type"]), one_line(str(error["message"]), 300)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        name, message = "", ""
    if name in _KNOWN_TYPES and message:
        return ErrorKind(name, status, message)
    return ErrorKind(
        "ForeignAnswerError", status, f"Status {status}, and not from this service; check what is between."
    )


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Return the seconds that the header Retry-After asks for (a number or an HTTP date); None where it asks for none."""
    text = (value or "").strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds())
