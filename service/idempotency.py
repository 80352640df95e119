"""The header Idempotency-Key of POST /classify and POST /jobs."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.requests import Request

from error_handler import RequestError
from service import errors

_KEY_PATTERN, _MAX_KEY_CHARACTERS = r"^[!-~]([ -~]*[!-~])?$", 255
# The routes read it from the headers, because a parameter of FastAPI takes much longer.
KEY_PARAMETER: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": _MAX_KEY_CHARACTERS, "pattern": _KEY_PATTERN},
    "description": "the same key with the same body is one request and gets the same answer",
}
REPLAYED: dict[str, Any] = {
    "Idempotency-Replayed": {
        "schema": {"const": "true"},
        "description": "present if the answer is that of an earlier request with this Idempotency-Key",
    },
}


def idempotency_key(request: Request) -> str | None:
    """Return the key of *request*, None if it has none; raise RequestError (BAD_HEADER) if it is malformed."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (len(key) <= _MAX_KEY_CHARACTERS and re.fullmatch(_KEY_PATTERN, key)):
        raise RequestError(errors.BAD_HEADER)
    return key


def fingerprint(body: BaseModel) -> bytes:
    """Return the SHA-256 of *body* as it was sent, whatever the order of its keys."""
    sent = orjson.dumps(body.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(sent).digest()
