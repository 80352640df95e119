"""Who is asking: named API keys, kept as digests and compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping

Headers = Mapping[bytes, bytes]


class KeyRing:
    """The keys that are let in, as (name, key) pairs; empty where everybody is."""

    def __init__(self, named_keys: Iterable[tuple[str, str]]) -> None:
        self._digests = [(name, hashlib.sha256(key.encode()).digest()) for name, key in named_keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, headers: Headers) -> str | None:
        """Return the name that belongs to the key in *headers* (names in lower case); None where it is none of ours.

        Every key is compared, whichever matches, so that the time tells nothing.
        """
        presented = hashlib.sha256(presented_key(headers)).digest()
        found = None
        for name, digest in self._digests:
            if hmac.compare_digest(presented, digest):
                found = name
        return found


def presented_key(headers: Headers) -> bytes:
    """Return the key in ``X-API-Key`` or ``Authorization`` (Bearer, or the password of Basic); empty without one.

    Basic is there for browsers and scrapers, which have no other way to show a key.
    """
    if b"x-api-key" in headers:
        return headers[b"x-api-key"]
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
