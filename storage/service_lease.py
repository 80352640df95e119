"""The lease by which the service goes before the worker on one model server: one document for each server in MongoDB.

Readers compare its value with the one before and never with a clock. A lease that is not renewed ends by itself,
however the service ended and whatever the clocks of the machines show.
"""

from __future__ import annotations

import hashlib
import socket
from typing import Any
from urllib.parse import urlsplit

from pymongo import WriteConcern, timeout

from storage.mongo_errors import translated

COLLECTION = "service_leases"
RENEW_S = 0.5  # the shortest time between two renewals
LEASE_S = 2.0  # a reader counts a lease as held this long after it saw a renewal
CALL_S = 1.0  # the timeout of one call

_PORTS = {"http": 80, "https": 443}
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def server_name(url: str) -> str:
    """Return the name of the model server at *url*, the same for all addresses of one server.

    A local address gets the name of this machine, because it names another server on each. The path is a hash, because it
    may hold a key.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in _THIS_MACHINE:
        host = socket.gethostname().lower()
    path = f"/{hashlib.sha256(parts.path.encode()).hexdigest()[:16]}" if parts.path else ""
    return f"{host}:{parts.port or _PORTS[parts.scheme]}{path}"


async def renew_lease(database: Any, *servers: str) -> None:
    """Renew the lease on each of *servers*, shared by all services that use it.

    Raises:
        StoreError: MongoDB did not store it within CALL_S.
        ConfigurationError: MONGODB_URI cannot be used.
    """
    leases = database.get_collection(COLLECTION, write_concern=WriteConcern(1))
    with translated("renew the lease of the service"), timeout(CALL_S):
        for server in servers:
            await leases.update_one({"_id": server}, {"$currentDate": {"renewed_at": True}}, upsert=True)


async def lease_renewal(database: Any, *servers: str) -> Any:
    """Return a value that changes with each renewal of the lease on one of *servers*; None if there has never been one.

    Raises:
        StoreError: MongoDB did not answer within CALL_S.
        ConfigurationError: MONGODB_URI cannot be used.
    """
    with translated("read the lease of the service"), timeout(CALL_S):
        if len(servers) == 1:
            found = await database[COLLECTION].find_one({"_id": servers[0]})
            return None if found is None else found.get("renewed_at")
        several = await database[COLLECTION].find({"_id": {"$in": servers}}).sort("_id").to_list(None)
    return [one.get("renewed_at") for one in several] or None
