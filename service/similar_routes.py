"""GET and POST /similar: past conversations similar to a text."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Query, Request

from error_handler import RequestError
from service import errors
from service.access import SIMILAR
from service.admission import cancel_on_disconnect
from service.error_responses import documented_errors
from service.openapi import KEY_REQUIRED
from service.similar_contract import (
    MAX_QUERY_CHARACTERS,
    MAX_SEARCH_CHARACTERS,
    SimilarQuery,
    SimilarRequest,
    SimilarResponse,
    searched_text,
)
from service.startup import Service

_ERRORS = (
    *errors.COMMON_ERRORS,
    errors.INDEX_NOT_INSTALLED,
    errors.INDEX_EMPTY,
    errors.INDEX_UNUSABLE,
    errors.TEXT_STAYS,
    errors.EMBEDDING_AWAY,
)

router = APIRouter(tags=["similar conversations"])


async def _require_plain_query(request: Request) -> None:
    """FastAPI replaces what is not UTF-8, and takes the last of two values."""
    try:
        pairs = parse_qsl(
            request.scope["query_string"].decode(), keep_blank_values=True, errors="strict", max_num_fields=10
        )
    except ValueError as exc:  # UnicodeDecodeError is one
        raise RequestError(errors.INVALID, "The query is not percent-encoded UTF-8; encode the text.") from exc
    if len(dict(pairs)) != len(pairs):
        raise RequestError(errors.INVALID, "The query names a parameter twice; name text and limit once.")


@router.get(
    SIMILAR,
    operation_id="similarByUrl",
    summary="Find past conversations similar to a text",
    openapi_extra=KEY_REQUIRED,
    responses=documented_errors(*_ERRORS),
    dependencies=[Depends(_require_plain_query)],
)
async def similar_by_url(query: Annotated[SimilarQuery, Query()], request: Request) -> SimilarResponse:
    """Prefer POST /similar: proxies log URLs, and the text in them."""
    limit = min(MAX_QUERY_CHARACTERS, request.state.service.settings.max_text_characters)
    if len(query.text) > limit:
        raise RequestError(
            errors.INVALID, f"text: at most {limit} characters fit in a URL; send less, or use POST /similar."
        )
    return await similar(query, request)


@router.post(
    SIMILAR,
    operation_id="similar",
    summary="Find past conversations similar to a text",
    openapi_extra=KEY_REQUIRED,
    responses=documented_errors(*_ERRORS, *errors.BODY_ERRORS),
)
async def similar(wanted: SimilarRequest, request: Request) -> SimilarResponse:
    """Return past conversations, the most similar one first."""
    service: Service = request.state.service
    text = searched_text(wanted.text, min(MAX_SEARCH_CHARACTERS, service.settings.max_text_characters))
    search = service.similar.find(text, wanted.limit, request.state.deadline)
    response, queue_s, search_s = await cancel_on_disconnect(search, request.receive)
    request.state.note = f", waited {queue_s * 1000:.0f} ms, search {search_s * 1000:.0f} ms"
    return response
