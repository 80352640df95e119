"""The OpenAPI document: FastAPI's own, with the limits and keys from the settings, which are known after the start."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from config.service_settings import ServiceSettings
from service.access import METRICS
from service.similar_contract import MAX_QUERY_CHARACTERS, MAX_SEARCH_CHARACTERS

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


def openapi_document(app: FastAPI, settings: ServiceSettings) -> dict[str, Any]:
    """Return FastAPI's document of *app* for a service with *settings*."""
    document = copy.deepcopy(app.openapi())
    schemas, paths = document["components"]["schemas"], document["paths"]
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES
    schemas["Message"]["properties"]["text"]["maxLength"] = settings.max_text_characters
    schemas["ClassificationRequest"]["properties"]["messages"]["maxItems"] = settings.max_messages
    schemas["SimilarRequest"]["properties"]["text"]["maxLength"] = min(
        MAX_SEARCH_CHARACTERS, settings.max_text_characters
    )
    for parameter in paths["/similar"]["get"]["parameters"]:
        if parameter["name"] == "text":
            parameter["schema"]["maxLength"] = min(MAX_QUERY_CHARACTERS, settings.max_text_characters)
    if settings.expose_metrics == "off":
        del paths[METRICS]
    elif settings.expose_metrics == "public":
        paths[METRICS]["get"]["security"] = []
    if settings.keys is None:
        for operations in paths.values():
            for operation in operations.values():
                operation["security"] = []
    return document
