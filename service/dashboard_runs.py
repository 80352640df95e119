"""The tab *Runs* of the page ``/dashboard``: the state of all workers, as it changes, and orders to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from error_handler import ConfigurationError, RequestError, StoreError
from service import errors
from service.access import DASHBOARD, DASHBOARD_EVENTS
from service.dashboard_routes import PAGE_HEADERS, back_to, dashboard_of, page_response
from service.pages import require_own_page
from storage.heartbeats import Action

logger = logging.getLogger(__name__)

SEND_EVERY_S = 2.0
STREAM_S = 600.0  # then the browser connects again

dashboard_runs = APIRouter(include_in_schema=False)


@dashboard_runs.get(DASHBOARD)
async def runs_page(request: Request) -> Response:
    """Return the page with the tab."""
    dashboard = dashboard_of(request)
    view = await dashboard.within(request.state.deadline, dashboard.runs.view())
    return page_response(request, "runs", 503 if view.problem else 200, view=view, problem=view.problem)


@dashboard_runs.get(DASHBOARD_EVENTS)
async def events(request: Request) -> Response:
    """Send the state of all workers as HTML, each SEND_EVERY_S, until the reader leaves or the service stops."""
    headers = {**PAGE_HEADERS, "X-Accel-Buffering": "no"}  # nginx would keep it back
    return StreamingResponse(_stream(request), media_type="text/event-stream", headers=headers)


async def _stream(request: Request) -> AsyncIterator[str]:
    dashboard, loop = dashboard_of(request), asyncio.get_running_loop()
    ends_at = loop.time() + STREAM_S
    while loop.time() < ends_at and not request.state.service.gate.stopping:
        html = dashboard.render("runs_now", DASHBOARD, view=await dashboard.runs.view())
        yield "event: runs\n" + "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
        await asyncio.sleep(SEND_EVERY_S)


@dashboard_runs.post(f"{DASHBOARD}/runs/{{heartbeat_id}}/{{action}}", dependencies=[Depends(require_own_page)])
async def order(heartbeat_id: str, action: Action, request: Request) -> Response:
    """Order a worker to pause, to resume or to stop."""
    dashboard = dashboard_of(request)
    given = dashboard.runs.order(heartbeat_id, action, request.state.caller)
    try:
        if not await dashboard.within(request.state.deadline, given):
            raise RequestError(errors.NO_WORKER)
    except (StoreError, ConfigurationError) as exc:
        logger.warning("dashboard: %s", exc)
        raise errors.unavailable(errors.STORE_AWAY) from exc
    return back_to(request)
