"""GET /labels: the taxonomy that the service started with."""

from __future__ import annotations

import hashlib

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from config import Taxonomy
from service import errors
from service.access import LABELS
from service.contract import FIELD_DESCRIPTIONS
from service.openapi import KEY_REQUIRED, documented_errors


class LabelDescription(BaseModel):
    """One label."""

    name: str = Field(description="as in results")
    definition: str = Field(description="when it applies; empty if the taxonomy has none")


class FieldDescription(BaseModel):
    """One field of a classification."""

    name: str = Field(description="its key in a classification")
    definition: str = Field(description="what it says about a conversation; empty if the taxonomy has none")
    multiple: bool = Field(description="whether a conversation can have several of the labels; then they are a list")
    labels: list[LabelDescription]


class LabelsResponse(BaseModel):
    """The fields of a classification and their labels, in the order of the taxonomy."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "fields": [
                        {
                            "name": "sentiment",
                            "definition": "",
                            "multiple": False,
                            "labels": [{"name": "Positive", "definition": ""}],
                        }
                    ],
                    "categorization": True,
                }
            ]
        }
    )

    fields: list[FieldDescription]
    categorization: bool = Field(description="whether a classification has a one-line summary, `categorization`")


_ETAG = {"ETag": {"schema": {"type": "string"}, "description": "changes with the taxonomy"}}
_responses = documented_errors(errors.UNAUTHENTICATED, errors.WRONG_HOST, errors.TOO_MANY, errors.INTERNAL)
_responses[200]["headers"] = {**_responses[200]["headers"], **_ETAG}
_responses[304] = {"description": "the taxonomy is the one of If-None-Match", "headers": _responses[200]["headers"]}

labels = APIRouter(tags=["classification"])


@labels.get(
    LABELS,
    operation_id="labels",
    summary="List the fields and their labels",
    response_model=LabelsResponse,
    responses=_responses,
    openapi_extra={
        **KEY_REQUIRED,
        "parameters": [
            {
                "name": "If-None-Match",
                "in": "header",
                "required": False,
                "schema": {"type": "string"},
                "description": "the ETag of an earlier answer; if nothing has changed, the answer is 304 without a body",
            }
        ],
    },
)
async def list_labels(request: Request) -> Response:
    """Return the taxonomy that the service started with."""
    body = orjson.dumps(described(request.state.service.model.taxonomy).model_dump())
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}  # keep it, and ask whether it is still right
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def described(taxonomy: Taxonomy) -> LabelsResponse:
    """Return *taxonomy* as the answer of GET /labels."""
    return LabelsResponse(
        fields=[
            FieldDescription(
                name=field.name,
                definition=field.definition or FIELD_DESCRIPTIONS.get(field.name, ""),
                multiple=field.is_multiple,
                labels=[LabelDescription(name=label.name, definition=label.definition) for label in field.labels],
            )
            for field in taxonomy.fields
        ],
        categorization=taxonomy.has_categorization,
    )
