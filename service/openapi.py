"""The OpenAPI document: FastAPI's own, with the limits and keys from the settings, which are known after the start."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from config.service_settings import ServiceSettings
from service.access import METRICS

# ServiceGate checks keys before the body is read, which a dependency cannot do. A route only describes them, and the
# request id of the middleware: dependencies without a purpose would cost each request 0.1 ms.
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
KEY_REQUIRED: dict[str, Any] = {"security": [{name: []} for name in _SECURITY_SCHEMES]}
REQUEST_ID_PARAMETER: dict[str, Any] = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "used as the request's id if it is 1 to 64 of A-Z a-z 0-9 . _ -, otherwise replaced",
}

# One character may take twelve bytes of a URL, and a URL has at most 64 KiB.
MAX_SEARCH_CHARACTERS, MAX_QUERY_CHARACTERS = 10_000, 2000


def openapi_document(app: FastAPI, settings: ServiceSettings) -> dict[str, Any]:
    """Return FastAPI's document of *app* for a service with *settings*."""
    document = copy.deepcopy(app.openapi())
    schemas, paths = document["components"]["schemas"], document["paths"]
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES
    schemas["Message"]["properties"]["text"]["maxLength"] = settings.max_text_characters
    schemas["ClassificationRequest"]["properties"]["messages"]["maxItems"] = settings.max_messages
    schemas["SimilarRequest"]["properties"]["text"]["maxLength"] = search_characters(settings)
    for parameter in paths["/similar"]["get"]["parameters"]:
        if parameter["name"] == "text":
            parameter["schema"]["maxLength"] = query_characters(settings)
    if settings.expose_metrics == "off":
        del paths[METRICS]
    elif settings.expose_metrics == "public":
        paths[METRICS]["get"]["security"] = []
    if settings.keys is None:
        for operations in paths.values():
            for operation in operations.values():
                operation["security"] = []
    return document


def search_characters(settings: ServiceSettings) -> int:
    """Return the maximum length of a text to search for."""
    return min(MAX_SEARCH_CHARACTERS, settings.max_text_characters)


def query_characters(settings: ServiceSettings) -> int:
    """Return the maximum length of such a text in a URL."""
    return min(MAX_QUERY_CHARACTERS, settings.max_text_characters)
