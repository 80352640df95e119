"""The tab *Labels* of the page ``/dashboard``: charts of the results as they are now, and examples to look at."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from aggregator import aggregate_conversation
from analytics.aggregates import Order
from analytics.charts import STYLE
from analytics.figures import Example
from analytics.svg import patterns
from domain.conversation import Turn
from error_handler import ConfigurationError, RequestError, SkippedDocumentError, StoreError, TriadError
from service import errors
from service.access import DASHBOARD
from service.dashboard import Dashboard
from service.dashboard_routes import PAGE_HEADERS, dashboard_of, page_response
from service.labels_query import LabelsQuery, labels_query
from storage.extended_json import id_key

FACETS = 30  # labels of a field, and channels, with links

dashboard_labels = APIRouter(prefix=DASHBOARD, include_in_schema=False)


@dashboard_labels.get("/labels")
async def labels_page(request: Request) -> Response:
    """Return the page with the filters; its script asks for the charts. It costs MongoDB nothing."""
    return _page(request, _query(request), charts=None)


@dashboard_labels.get("/charts")  # as deep as /labels, whose script takes the charts with their relative links
async def charts_page(request: Request) -> Response:
    """Return the page with the charts of a view; 202 while they are computed for the first time."""
    return _counted(request, "charts")


@dashboard_labels.get("/tables")
async def tables_page(request: Request) -> Response:
    """Return the page with the tables of all charts of a view, as ``charts_page`` does."""
    return _counted(request, "tables")


def _counted(request: Request, shown: str) -> Response:
    dashboard, query = dashboard_of(request), _query(request)
    try:
        last = dashboard.labels.last(query)
    except TriadError as exc:
        return _problem(request, query, exc)
    if last is None:
        progress = dashboard.labels.progress(query)
        return _page(request, query, 202, charts={"progress": progress}, shown=shown)
    figures = last.value
    charts = {
        "at": last.at,
        "duration_s": last.duration_s,
        "figures": figures,
        "channels": list(figures.fields[0][0].counts.channels.items())[:FACETS] if figures.fields else [],
    }
    return _page(request, query, charts=charts, shown=shown, patterns=patterns(), facets=FACETS)


@dashboard_labels.get("/examples/{order}")
async def examples_page(order: Order, request: Request) -> Response:
    """Return the page with results of a view: ids, labels, confidence; texts only if DASHBOARD_SHOW_TEXT is set."""
    dashboard, query = dashboard_of(request), _query(request)
    try:
        last = dashboard.labels.last_examples(query, order)
        texts = {}
        if last is not None and dashboard.shows_text:
            texts = await dashboard.within(request.state.deadline, _texts(dashboard, last.value))
    except TriadError as exc:
        return _problem(request, query, exc)
    status, examples = (202, None) if last is None else (200, last.value)
    return _page(request, query, status, charts=None, order=order, examples=examples, texts=texts)


@dashboard_labels.get("/charts.css")
async def style(request: Request) -> Response:
    """Return the style sheet of the charts."""
    dashboard_of(request)
    return Response(STYLE, media_type="text/css", headers=PAGE_HEADERS)


@dashboard_labels.get("/labels.js")
async def script(request: Request) -> Response:
    """Return the script, which asks for the charts until they are computed."""
    return Response(dashboard_of(request).files["labels.js"], media_type="text/javascript", headers=PAGE_HEADERS)


async def _texts(dashboard: Dashboard, examples: list[Example]) -> dict[bytes, tuple[Turn, ...]]:
    """Return the turns of those *examples* that still have a readable conversation, by ``id_key``."""
    found = {}
    for document in await dashboard.store.read_documents("all", [one.document_id for one in examples]):
        try:
            found[id_key(document["_id"])] = aggregate_conversation(document).turns
        except SkippedDocumentError:
            continue
    return found


def _query(request: Request) -> LabelsQuery:
    labels = dashboard_of(request).labels
    return labels_query(request.scope["query_string"], labels.taxonomy, labels.zone)


def _page(request: Request, query: LabelsQuery, status: int = 200, **values: Any) -> Response:
    dashboard = dashboard_of(request)
    values = {"problem": "", "order": None, "shown": "charts", "id_key": id_key, **values}
    shows_text = dashboard.shows_text
    return page_response(
        request, "labels", status, view=query, labels=dashboard.labels, shows_text=shows_text, **values
    )


def _problem(request: Request, query: LabelsQuery, problem: TriadError) -> Response:
    """Return the page with a sentence instead of the charts."""
    if not isinstance(problem, RequestError):
        is_away = isinstance(problem, StoreError | ConfigurationError)
        problem = RequestError(errors.STORE_AWAY if is_away else errors.INTERNAL)
    return _page(request, query, problem.kind.status, problem=str(problem), charts=None)
