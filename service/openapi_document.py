"""The OpenAPI document of the service: every body, status and header it has, with the limits that are set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from config.service_settings import ServiceSettings
from error_handler import ErrorKind, RequestError
from service import errors

Json = dict[str, Any]

# A character that `safe_text` keeps and that is not white space.
VISIBLE = r"[^\s\x00-\x1f\x7f-\xa0\u1680\u2000-\u200b\u2028-\u202f\u205f\u2060\u2066-\u2069\u3000\ufeff]"

EXAMPLE_REQUEST: Json = {
    "conversation_number": "123",
    "messages": [
        {
            "sender": "customer",
            "timestamp": "2026-11-21T10:00:00Z",
            "text": "My parcel should have been here on Monday. Where is it? This is the second time!",
        },
        {
            "sender": "agent",
            "timestamp": "2026-11-21T10:01:00Z",
            "text": "I am sorry to hear that. Could you tell me the order number?",
        },
    ],
}
EXAMPLE_LABELS: Json = {
    "intent": "Order Status",
    "topic": "Shipping/Delivery",
    "sentiment": "Negative",
    "categorization": "The customer asks where a parcel is that is late for the second time.",
}

EXAMPLE_SEARCH: Json = {"text": "My parcel has not come, and nobody answers.", "limit": 5}
EXAMPLE_HITS: Json = {
    "model": "all-MiniLM-L6-v2",
    "hits": [
        {
            "source_id": '{"$oid": "65f1c0ffee65f1c0ffee65f1"}',
            "conversation_number": "123",
            "similarity": 0.7421,
            "classification": EXAMPLE_LABELS,
            "classified_at": "2026-11-21T10:02:00+00:00",
            "classified_by": "llama3.2",
        }
    ],
}
DEFAULT_HITS, MAX_HITS = 5, 50
# Of a text to look for. A URL has at most 64 KiB, and a character up to twelve of them.
MAX_SEARCH_CHARACTERS, MAX_QUERY_CHARACTERS = 10_000, 2000

_CLASSIFY_ERRORS = (
    errors.INVALID_JSON,
    errors.BAD_HEADER,
    errors.UNAUTHENTICATED,
    errors.BODY_TOO_SLOW,
    errors.TOO_LARGE,
    errors.NOT_JSON,
    errors.WRONG_HOST,
    errors.INVALID,
    errors.TOO_LONG,
    errors.KEY_REUSED,
    errors.TOO_MANY,
    errors.INTERNAL,
    errors.UNUSABLE_ANSWER,
    errors.MODEL_AWAY,
    errors.QUEUE_FULL,
    errors.STOPPING,
    errors.TOO_SLOW,
)
_SIMILAR_ERRORS = (
    errors.UNAUTHENTICATED,
    errors.WRONG_HOST,
    errors.INVALID,
    errors.TOO_MANY,
    errors.INTERNAL,
    errors.UNUSABLE_ANSWER,
    errors.INDEX_NOT_INSTALLED,
    errors.INDEX_EMPTY,
    errors.INDEX_UNUSABLE,
    errors.TEXT_STAYS,
    errors.EMBEDDING_AWAY,
    errors.QUEUE_FULL,
    errors.STOPPING,
    errors.TOO_SLOW,
)
_BODY_ERRORS = (errors.INVALID_JSON, errors.BODY_TOO_SLOW, errors.TOO_LARGE, errors.NOT_JSON)
_REQUEST_ID: Json = {"X-Request-ID": {"schema": {"type": "string"}, "description": "the request's id, also in the log"}}
_RETRY_AFTER: Json = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}}


def build_openapi(schemas: Json, settings: ServiceSettings, version: str) -> Json:
    """Return the document.

    *schemas* are the JSON Schemas of ClassificationRequest, ClassificationResponse, SimilarRequest, SimilarResponse,
    ErrorResponse and what they refer to, by name, with references to ``#/components/schemas/``.
    """
    security: list[Json] = [{"bearer": []}, {"header": []}] if settings.keys else []
    exposed = security if settings.expose_metrics == "key" else []
    paths: Json = {
        "/classify": {"post": _classify(security)},
        "/similar": {"get": _similar_get(security, settings), "post": _similar_post(security)},
        "/health": {
            "get": _get("Alive; asks nobody", _json("HealthResponse", {"status": "ok"}), [], [errors.WRONG_HOST])
        },
        "/ready": {
            "get": _get(
                "The model server answers and has the model",
                _json("ReadyResponse", {"status": "ready", "model": "llama3.2"}),
                [],
                [errors.WRONG_HOST, errors.MODEL_AWAY, errors.MODEL_MISSING],
            )
        },
    }
    if settings.expose_metrics != "off":
        text = {"text/plain": {"schema": {"type": "string"}}}
        refusals = [errors.UNAUTHENTICATED, errors.TOO_MANY, errors.WRONG_HOST]
        paths["/metrics"] = {"get": _get("Numbers in Prometheus text", text, exposed, refusals)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Customer Support Triad",
            "version": version,
            "description": "Labels one support conversation with intent, topic and sentiment, now. Durations are in seconds.",
        },
        "paths": paths,
        "components": {
            "schemas": _limited(schemas, settings) | _STATUS_SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


_STATUS_SCHEMAS: Json = {
    "HealthResponse": {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"const": "ok"}},
        "additionalProperties": False,
    },
    "ReadyResponse": {
        "type": "object",
        "required": ["status", "model"],
        "properties": {
            "status": {"const": "ready"},
            "model": {"type": "string", "description": "what gives the labels"},
        },
        "additionalProperties": False,
    },
}


def _limited(schemas: Json, settings: ServiceSettings) -> Json:
    """Return *schemas* with the limits that are set, and the rule that a customer says something."""
    message = schemas["Message"]
    text = {**message["properties"]["text"], "maxLength": settings.max_text_characters}
    request = schemas["ClassificationRequest"]
    said = {"properties": {"sender": {"const": "customer"}, "text": {"pattern": VISIBLE}}}
    search = schemas["SimilarRequest"]
    wanted = {**search["properties"]["text"], "maxLength": search_characters(settings), "pattern": VISIBLE}
    messages = {**request["properties"]["messages"], "maxItems": settings.max_messages, "contains": said}
    return {
        **schemas,
        "Message": {**message, "properties": {**message["properties"], "text": text}},
        "ClassificationRequest": {**request, "properties": {**request["properties"], "messages": messages}},
        "SimilarRequest": {**search, "properties": {**search["properties"], "text": wanted}},
    }


def search_characters(settings: ServiceSettings) -> int:
    """Return how long a text to look for may be."""
    return min(MAX_SEARCH_CHARACTERS, settings.max_text_characters)


def query_characters(settings: ServiceSettings) -> int:
    """Return how long it may be in a URL."""
    return min(MAX_QUERY_CHARACTERS, settings.max_text_characters)


def _classify(security: list[Json]) -> Json:
    answered = {
        "description": "The conversation as it was sent, and its labels",
        "headers": {
            **_REQUEST_ID,
            "X-Model": {"schema": {"type": "string"}, "description": "what gave the labels"},
            "X-Input-Complete": {
                "schema": {"const": "false"},
                "description": "there where the conversation was too long and the model saw only a part of it",
            },
            "Idempotency-Replayed": {
                "schema": {"const": "true"},
                "description": "there where the answer was kept from an earlier request with this Idempotency-Key",
            },
        },
        "content": _json("ClassificationResponse", {**EXAMPLE_REQUEST, "classification": EXAMPLE_LABELS}),
    }
    return {
        "tags": ["classification"],
        "summary": "Label one conversation",
        "operationId": "classify",
        "security": security,
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
                "description": "the same key with the same body asks the model once and gets the same answer",
            },
            {
                "name": "X-Request-ID",
                "in": "header",
                "required": False,
                "schema": {"type": "string"},
                "description": "taken over where it is 1 to 64 of A-Z a-z 0-9 . _ -; any other is replaced",
            },
        ],
        "requestBody": {"required": True, "content": _json("ClassificationRequest", EXAMPLE_REQUEST)},
        "responses": {"200": answered, **_errors(_CLASSIFY_ERRORS)},
    }


def _similar_get(security: list[Json], settings: ServiceSettings) -> Json:
    text = {"type": "string", "minLength": 1, "maxLength": query_characters(settings), "pattern": VISIBLE}
    limit = {"type": "integer", "minimum": 1, "maximum": MAX_HITS, "default": DEFAULT_HITS}
    return {
        **_similar(security, "similarByUrl", _SIMILAR_ERRORS),
        "description": "URLs, and the text in them, end in the logs of proxies: POST /similar keeps it in the body.",
        "parameters": [
            {"name": "text", "in": "query", "required": True, "schema": text, "example": EXAMPLE_SEARCH["text"]},
            {"name": "limit", "in": "query", "required": False, "schema": limit},
        ],
    }


def _similar_post(security: list[Json]) -> Json:
    return {
        **_similar(security, "similar", (*_SIMILAR_ERRORS, *_BODY_ERRORS)),
        "requestBody": {"required": True, "content": _json("SimilarRequest", EXAMPLE_SEARCH)},
    }


def _similar(security: list[Json], operation: str, refusals: Iterable[ErrorKind]) -> Json:
    answered = {
        "description": "Past conversations, the most similar one first",
        "headers": _REQUEST_ID,
        "content": _json("SimilarResponse", EXAMPLE_HITS),
    }
    return {
        "tags": ["similar conversations"],
        "summary": "Find past conversations like a text",
        "operationId": operation,
        "security": security,
        "responses": {"200": answered, **_errors(refusals)},
    }


def _get(summary: str, content: Json, security: list[Json], refusals: list[ErrorKind]) -> Json:
    answered = {"description": summary, "headers": _REQUEST_ID, "content": content}
    return {
        "tags": ["operations"],
        "summary": summary,
        "security": security,
        "responses": {"200": answered, **_errors([*refusals, errors.INTERNAL])},
    }


def _errors(kinds: Iterable[ErrorKind]) -> Json:
    by_status: dict[int, list[ErrorKind]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    responses = {}
    for status, same in sorted(by_status.items()):
        examples = {kind.name: {"value": RequestError(kind).body} for kind in same}
        schema = {"$ref": "#/components/schemas/ErrorResponse"}
        headers = {**_REQUEST_ID, **(_RETRY_AFTER if status in (429, 503) else {})}
        content = {"application/json": {"schema": schema, "examples": examples}}
        description = ", ".join(dict.fromkeys(kind.name for kind in same))
        responses[str(status)] = {"description": description, "headers": headers, "content": content}
    return responses


def _json(schema: str, example: Json) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example}}
