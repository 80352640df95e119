"""The documentation that the service serves: the OpenAPI document and the page at /docs."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from config import Taxonomy
from config.service_settings import ServiceSettings
from config.taxonomy import TRIAD
from error_handler import ErrorKind, RequestError
from logger import REQUEST_ID_HEADER
from service.access import JOBS, METRICS, REVIEW
from service.contract import EXAMPLE_LABELS, ErrorResponse, labels_schema
from service.similar import MAX_QUERY_CHARACTERS, MAX_SEARCH_CHARACTERS
from service.webhooks import MAX_URL_CHARACTERS, url_pattern

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
_REQUEST_ID: dict[str, Any] = {
    REQUEST_ID_HEADER: {"schema": {"type": "string"}, "description": "the request's id, also in the log"}
}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}}

DOCS_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Customer Support Triad</title>
<link rel="icon" href="docs/assets/favicon.png">
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

# A separate file: the content security policy allows no inline script. validatorUrl would send the document elsewhere.
START_SCRIPT = """window.onload = () => SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", tryItOutEnabled: true, validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout", defaultModelsExpandDepth: 1
});
"""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def documented_errors(*kinds: ErrorKind) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses=`` of a route that answers with *kinds*, and the headers of its success."""
    responses: dict[int | str, dict[str, Any]] = {200: {"headers": _REQUEST_ID}}
    for kind in kinds:
        headers = {**_REQUEST_ID, **(_RETRY_AFTER if kind.status in (429, 503) else {})}
        empty = {"model": ErrorResponse, "description": "", "headers": headers}
        response = responses.setdefault(kind.status, {**empty, "content": {"application/json": {"examples": {}}}})
        examples = response["content"]["application/json"]["examples"]
        examples[kind.name] = {"value": RequestError(kind).body}
        response["description"] = ", ".join(examples)
    return responses


def openapi_document(
    app: FastAPI, settings: ServiceSettings, taxonomy: Taxonomy, *, has_sentence: bool = True
) -> dict[str, Any]:
    """Return FastAPI's document of *app*, with what is known after the start.

    That is the limits and keys of *settings*, and the fields of *taxonomy*. *has_sentence* is False for the short reply
    styles, whose answers lack the categorization.
    """
    document = copy.deepcopy(app.openapi())
    schemas, paths = document["components"]["schemas"], document["paths"]
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES
    _describe_labels(document, taxonomy, has_sentence=has_sentence)
    _loosen_items(schemas)
    longest = settings.max_text_characters
    schemas["Message"]["properties"]["text"]["maxLength"] = longest
    schemas["ClassificationRequest"]["properties"]["messages"]["maxItems"] = settings.max_messages
    schemas["SimilarRequest"]["properties"]["text"]["maxLength"] = min(MAX_SEARCH_CHARACTERS, longest)
    schemas["JobRequest"]["properties"]["conversations"]["maxItems"] = settings.job_max_conversations
    if settings.allowed_origins:
        url = {"type": "string", "pattern": url_pattern(settings.allowed_origins), "maxLength": MAX_URL_CHARACTERS}
        schemas["JobRequest"]["properties"]["webhook"] |= {"anyOf": [url, {"type": "null"}]}
    else:
        del schemas["JobRequest"]["properties"]["webhook"]
    for parameter in paths["/similar"]["get"]["parameters"]:
        if parameter["name"] == "text":
            parameter["schema"]["maxLength"] = min(MAX_QUERY_CHARACTERS, longest)
    if settings.expose_metrics == "off":
        del paths[METRICS]
    elif settings.expose_metrics == "public":
        paths[METRICS]["get"]["security"] = []
    switches = {REVIEW: settings.expose_review, JOBS: settings.expose_jobs}
    hidden = tuple(page for page, exposure in switches.items() if exposure == "off")
    for path in [path for path in paths if path.startswith(hidden)]:
        del paths[path]
    if settings.keys is None:
        for operations in paths.values():
            for operation in operations.values():
                operation["security"] = []
    return document


def _loosen_items(schemas: dict[str, Any]) -> None:
    """Leave out of a conversation of many what makes only that conversation fail, not the whole request."""
    schemas["ItemMessage"] = {**copy.deepcopy(schemas["Message"]), "title": "ItemMessage"}
    messages = schemas["BatchItem"]["properties"]["messages"]
    del messages["contains"]
    messages["items"] = {"$ref": "#/components/schemas/ItemMessage"}


def _leave_out_sentence(schemas: dict[str, Any], taxonomy: Taxonomy) -> None:
    schemas["Labels"] = labels_schema(taxonomy, has_sentence=False)
    answer, found = (schemas[name]["examples"][0] for name in ("ClassificationResponse", "SimilarResponse"))
    for shown in (answer, *found["hits"]):
        shown["classification"] = {
            name: label for name, label in shown["classification"].items() if name != "categorization"
        }


def _describe_labels(document: dict[str, Any], taxonomy: Taxonomy, *, has_sentence: bool) -> None:
    """Fill in the labels of *taxonomy*; for the shipped fields, the document is that of the code."""
    _describe_fields(document, taxonomy)
    if taxonomy.has_categorization and not has_sentence:
        _leave_out_sentence(document["components"]["schemas"], taxonomy)


def _describe_fields(document: dict[str, Any], taxonomy: Taxonomy) -> None:
    schemas = document["components"]["schemas"]
    schemas["Labels"] = labels_schema(taxonomy)
    schemas["PastLabels"] = labels_schema(taxonomy, is_closed=False)
    reference = {"$ref": "#/components/schemas/PastLabels"}
    schemas["SimilarConversation"]["properties"]["classification"] = reference
    if taxonomy.field_names == tuple(TRIAD.values()) and taxonomy.has_categorization:
        return
    document["info"]["description"] = (
        f"Classifies one support conversation at a time: {', '.join(taxonomy.field_names)}. Durations are in seconds."
    )
    example = {
        field.name: [field.names[0]] if field.is_multiple else EXAMPLE_LABELS.get(field.name, field.names[0])
        for field in taxonomy.fields
    }
    if taxonomy.has_categorization:
        example["categorization"] = EXAMPLE_LABELS["categorization"]
    names = ("ClassificationResponse", "BatchResponse", "SimilarResponse")
    answer, batch, found = (schemas[name]["examples"][0] for name in names)
    for shown in (answer, batch["results"][0], *found["hits"]):
        shown["classification"] = example
