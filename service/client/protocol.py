"""Requests to the REST service and its answers. Pure: no network, no clock."""

from __future__ import annotations

import email.utils
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from aggregator import aggregate_conversation, document_entries, entry_text
from domain.conversation import stored_labels
from domain.text import one_line
from error_handler import ConfigurationError, ErrorKind, RequestError
from service import errors as service_errors
from service.contract import MAX_NUMBER_CHARACTERS, MAX_TIMESTAMP_CHARACTERS
from storage.extended_json import id_text

MAX_ANSWER_BYTES = 33_554_432  # twice the largest request; an answer repeats the messages

# Worth another attempt; the Idempotency-Key prevents a second model call for the same answer.
REPEATED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# Not caused by the conversation, so every other request would fail the same way.
_SET_UP_WRONG = {
    401: "the service rejects the key; check --api-key-file or --api-key",
    403: "the service or a proxy denies access; check --url and the key",
    404: "there is no /classify at this address; check --url",
    405: "there is no POST /classify at this address; check --url",
    421: "without API_KEYS the service rejects this host name; use 127.0.0.1 in --url or set API_KEYS",
}
_KNOWN_TYPES = frozenset(kind.name for kind in vars(service_errors).values() if isinstance(kind, ErrorKind))


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """The address of the service, without a trailing slash, and the headers with the key."""

    url: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """One conversation, encoded; *key* is the SHA-256 of *body*."""

    number: str
    body: bytes
    key: bytes

    @property
    def id(self) -> str:
        """The start of the X-Request-ID of each attempt, which appears in the log of the service."""
        return self.key.hex()[:24]

    @property
    def headers(self) -> dict[str, str]:
        """The headers of *body*, the same in every attempt."""
        return {"Content-Type": "application/json", "Idempotency-Key": self.key.hex()}


def service_target(url: str, api_key: str | None = None, api_key_file: Path | None = None) -> ServiceTarget:
    """Return the target; *api_key_file* takes precedence over *api_key*.

    Raises:
        ConfigurationError: The address or the key is invalid, or the file cannot be read.
    """
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_usable = is_usable and "@" not in parts.netloc and not parts.query and not parts.fragment
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigurationError("--url must be http(s)://host[:port][/path] without user name, password or query.")
    if api_key_file is not None:
        try:
            api_key = api_key_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(
                f"Cannot read {api_key_file}; --api-key-file must name a file that holds only the key."
            ) from exc
    if api_key is None:
        return ServiceTarget(url.rstrip("/"), {})
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigurationError(
            "The API key must be printable ASCII without spaces; check --api-key-file or --api-key."
        )
    return ServiceTarget(url.rstrip("/"), {"Authorization": f"Bearer {api_key}"})


def build_request(number: str, messages: list[dict[str, str]]) -> ServiceRequest:
    """Return the request for one conversation; equal content has an equal key.

    Raises:
        RequestError: A text holds half of a surrogate pair, which JSON cannot encode.
    """
    try:
        body = orjson.dumps({"conversation_number": number, "messages": messages})
    except orjson.JSONEncodeError as exc:
        kind = ErrorKind("TextError", 0, "A text holds half of a surrogate pair; repair the file.")
        raise RequestError(kind) from exc
    return ServiceRequest(number, body, hashlib.sha256(body).digest())


def request_for(document: Mapping[str, Any], position: int) -> ServiceRequest:
    """Return the request for *document* of any accepted shape, number *position* (from 1) of its file.

    Texts are sent unchanged, in the listed order. An unknown sender is sent as the agent, because sentiment is judged
    from the customer's turns. The conversation number falls back to the ``_id``, then to *position*.

    Raises:
        SkippedDocumentError: There is no usable text, or none of the customer.
        RequestError: A text cannot be encoded as JSON.
    """
    conversation = aggregate_conversation(document)
    shape = conversation.shape
    entries = document_entries(document, shape)
    listed = [(entry, text) for entry in entries if (text := entry_text(entry))]
    # The aggregator rewrites texts, so it gets numbers instead and only returns sender and time.
    numbered = [{**entry, "text": str(index)} for index, (entry, _) in enumerate(listed)]
    turns = aggregate_conversation(numbered[0] if shape == "query" else {shape: numbered}).turns
    senders = {int(turn.text): (turn.sender, turn.at) for turn in turns}
    messages = []
    for index, (entry, text) in enumerate(listed):
        sender, at = senders[index]
        message = {"sender": "customer" if sender == "customer" else "agent"}
        timestamp = _timestamp(entry.get("timestamp") if shape == "messages" else None, at)
        messages.append(message | ({"timestamp": timestamp} if timestamp else {}) | {"text": text})
    number = conversation.conversation_number or ("_id" in document and id_text(document["_id"])) or str(position)
    return build_request(number[:MAX_NUMBER_CHARACTERS], messages)


def _timestamp(given: Any, at: datetime | None) -> str | None:
    """Return *given* if the service accepts it, else *at*."""
    if isinstance(given, str) and 0 < len(given) <= MAX_TIMESTAMP_CHARACTERS:
        return given
    return at.isoformat() if at is not None else None


def parse_answer(request: ServiceRequest, status: int, body: bytes, retry_after_s: int | None) -> dict[str, Any]:
    """Return the answer to *request*.

    Raises:
        RequestError: The service rejected or failed this conversation; the message holds none of its text.
        ConfigurationError: The service would reject every conversation.
    """
    if status == HTTPStatus.OK:
        return _parse_success(request, body)
    if 300 <= status < 400:
        raise ConfigurationError(f"The service redirects (status {status}); set --url to the final address.")
    if status in _SET_UP_WRONG:
        raise ConfigurationError(f"Status {status}: {_SET_UP_WRONG[status]}.")
    raise RequestError(_parse_error(status, body), retry_after_s=retry_after_s)


def _parse_success(request: ServiceRequest, body: bytes) -> dict[str, Any]:
    kind = ErrorKind("ForeignAnswerError", 200, "The answer is not from this service; check --url and any proxy.")
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestError(kind) from exc
    labels = answer.get("classification") if isinstance(answer, dict) else None
    if not isinstance(labels, dict) or not stored_labels(labels):
        raise RequestError(kind)
    if answer.get("conversation_number") != request.number:  # a cache that ignores request bodies
        raise RequestError(kind)
    return dict(answer)


def _parse_error(status: int, body: bytes) -> ErrorKind:
    """Return the error of the body if it is the service's own; another server may quote customer text."""
    try:
        error = orjson.loads(body)["error"]
        name, message = str(error["type"]), one_line(str(error["message"]), 300)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        name, message = "", ""
    if name in _KNOWN_TYPES and message:
        return ErrorKind(name, status, message)
    return ErrorKind("ForeignAnswerError", status, f"Status {status} from another server; check --url and any proxy.")


def parse_retry_after(value: str | None, now: datetime) -> int | None:
    """Return the seconds of a Retry-After header (a number or an HTTP date), or None."""
    text = (value or "").strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0, math.ceil(((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds()))
