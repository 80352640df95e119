"""Three commands to a mongod without a driver: enough to make a replica set of one.

The driver belongs to mongo_client.py. Requests are encoded here; of the answers only a flag and an
error's name are wanted, which are searched for in the raw bytes.
"""

from __future__ import annotations

import re
import socket
import struct
from typing import Any

COMMAND_TIMEOUT_S = 10.0


def run_command(port: int, document: dict[str, Any]) -> bytes:
    """Send *document* to the admin database as one OP_MSG and return the raw answer."""
    body = bytes(5) + _bson({**document, "$db": "admin"})  # no flags, one section of kind 0
    with socket.create_connection(("127.0.0.1", port), COMMAND_TIMEOUT_S) as connection:
        connection.sendall(struct.pack("<iiii", 16 + len(body), 1, 0, 2013) + body)
        with connection.makefile("rb") as stream:
            return stream.read(max(0, struct.unpack("<i", stream.read(4).ljust(4, b"\0"))[0] - 4))


def is_primary(reply: bytes) -> bool:
    """Whether the answer to ``hello`` says that the server takes writes."""
    return b"\x08isWritablePrimary\0\1" in reply


def error_name(reply: bytes) -> str | None:
    """Return the name of the error in *reply*; None where it holds no error."""
    match = re.search(rb"\x02codeName\0.{4}(\w+)\0", reply, re.DOTALL)
    return match[1].decode() if match else None


def _bson(document: dict[str, Any]) -> bytes:
    """Encode strings, 32-bit integers, truth values, lists and documents: all that the commands hold."""
    body = b""
    for key, value in document.items():
        name = key.encode() + b"\0"
        match value:
            case bool():
                body += b"\x08" + name + bytes([value])
            case int():
                body += b"\x10" + name + struct.pack("<i", value)
            case str():
                text = value.encode() + b"\0"
                body += b"\x02" + name + struct.pack("<i", len(text)) + text
            case list():
                body += b"\x04" + name + _bson({str(index): item for index, item in enumerate(value)})
            case dict():
                body += b"\x03" + name + _bson(value)
            case _:
                raise TypeError(f"no encoding for {type(value).__name__}")
    return struct.pack("<i", len(body) + 5) + body + b"\0"
