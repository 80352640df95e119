"""The tab *Quarantine* of the page ``/dashboard``: failed documents with reasons, replay and drop."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Request, Response

from error_handler import ConfigurationError, DirectoryLockedError, RequestError, StateDirectoryError, StoreError
from service import errors
from service.access import DASHBOARD
from service.dashboard_routes import back_to, dashboard_of, page_response
from service.pages import require_own_page
from service.quarantine import Selected
from storage import order_log

logger = logging.getLogger(__name__)

Change = Literal["replay", "drop"]
PATH = "/quarantine"
ORDERS_SHOWN = 10
MAX_CHARACTERS = 8000  # of a query: an id as canonical Extended JSON

dashboard_quarantine = APIRouter(prefix=f"{DASHBOARD}{PATH}", include_in_schema=False)


@dashboard_quarantine.get("")
async def quarantine_page(request: Request) -> Response:
    """Return the page with the list, of one ``reason`` if the query names it."""
    query = _query(request, {"reason", "did", "done", "stayed"})
    return await _answered(request, _list(request, query))


@dashboard_quarantine.get("/show")
async def detail_page(request: Request) -> Response:
    """Return the page with one document: ``id`` as Extended JSON."""
    dashboard, query = dashboard_of(request), _query(request, {"id"})

    async def show() -> Response:
        detail = await dashboard.quarantine.detail(query.get("id", ""))
        if detail is None:
            return _page(request, 404, problem="This document is not there any more; the list has the others.")
        return _page(request, detail=detail)

    return await _answered(request, show())


@dashboard_quarantine.post("/{change}", dependencies=[Depends(require_own_page)])
async def change_documents(change: Change, request: Request) -> Response:
    """Replay or drop the document ``id``, all of one ``reason``, or ``all=1``: the query names exactly one of these."""
    query = _query(request, {"id", "reason", "all"})
    if len(query) != 1 or query.get("all", "1") != "1":
        raise RequestError(errors.INVALID, "The query must have exactly one of id, reason and all=1.")
    selected = Selected((query["id"],) if "id" in query else None, query.get("reason"))
    return await _answered(request, _carry_out(request, change, selected))


async def _list(request: Request, query: Mapping[str, str]) -> Response:
    dashboard, reason = dashboard_of(request), query.get("reason")
    listed = await dashboard.quarantine.listed(reason)
    orders = await order_log.newest(dashboard.orders, ORDERS_SHOWN)
    return _page(request, listed=listed, reason=reason, orders=orders, said=_outcome(query))


async def _carry_out(request: Request, change: Change, selected: Selected) -> Response:
    """Carry *change* out between two entries in the collection of orders, so that none is without an entry."""
    dashboard, caller = dashboard_of(request), request.state.caller
    which = "one" if selected.ids else selected.reason or "all"
    given = {"action": change, "by": caller, "place": dashboard.quarantine.place, **asdict(selected)}
    order_id = await order_log.begin(dashboard.orders, given)
    outcome = await (dashboard.quarantine.replay if change == "replay" else dashboard.quarantine.drop)(selected)
    logger.info("dashboard: %s: %s failed documents (%s): %d", caller, change, which, outcome.done)
    await order_log.end(dashboard.orders, order_id, asdict(outcome))
    return back_to(request, f"{PATH}?{urlencode({'did': change, **asdict(outcome)})}")


async def _answered(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the result of *work* within the deadline of the request; what fails is a page that names the problem."""
    try:
        return await dashboard_of(request).within(request.state.deadline, work)
    except DirectoryLockedError:
        problem = RequestError(errors.FILES_IN_USE)
    except StateDirectoryError as exc:
        logger.warning("dashboard: %s", exc)
        problem = RequestError(errors.FILES_UNUSABLE)
    except ConfigurationError as exc:
        problem = RequestError(errors.INVALID, str(exc))
    except StoreError as exc:
        logger.warning("dashboard: %s", exc)
        problem = RequestError(errors.STORE_AWAY)
    return _page(request, problem.kind.status, problem=str(problem))


def _page(request: Request, status: int = 200, **values: Any) -> Response:
    dashboard = dashboard_of(request)
    shown = {"problem": "", "listed": None, "detail": None, "place": dashboard.quarantine, **values}
    return page_response(request, "quarantine", status, shows_text=dashboard.shows_text, **shown)


def _query(request: Request, names: set[str]) -> dict[str, str]:
    """Return the query of *request*, whose parameters are among *names*, each once."""
    try:
        raw = cast(bytes, request.scope["query_string"])
        pairs = parse_qsl(raw[:MAX_CHARACTERS].decode(), errors="strict", max_num_fields=8)
    except ValueError as exc:
        raise RequestError(errors.INVALID, "The query is not percent-encoded UTF-8.") from exc
    found = dict(pairs)
    if len(raw) > MAX_CHARACTERS or len(found) != len(pairs) or found.keys() - names:
        raise RequestError(errors.INVALID, "The query is too long, or has an unknown or repeated parameter.")
    return found


def _outcome(query: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what an order has done, as ``back_to`` put it into the address; None if it has none."""
    done, stayed = query.get("done", ""), query.get("stayed", "")
    if query.get("did") not in ("replay", "drop") or not (done.isdecimal() and stayed.isdecimal()):
        return None
    return {"did": query["did"], "done": int(done[:12]), "stayed": int(stayed[:12])}
