"""The page ``/dashboard``: its tabs, its templates, and the parts that the tabs share.

A tab is an entry in TABS, a template that extends ``frame.html``, and a module with its routes that answers with
``page_response``.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from config import Settings, Taxonomy, load_taxonomy
from config.report_settings import load_report_settings
from config.service_settings import ServiceSettings
from mongo_client import DURABLE, DocumentStore
from service.access import DASHBOARD
from service.admission import Deadlines
from service.labels import LabelsTab
from service.quarantine import open_quarantine
from service.review import with_little_patience
from service.runs import Runs, age, duration
from storage import order_log

T = TypeVar("T")

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, slots=True)
class Tab:
    """*name* is that of its template, *path* comes after ``/dashboard``."""

    name: str
    title: str
    path: str


TABS = (
    Tab("runs", "Runs", ""),
    Tab("labels", "Labels", "/labels"),
    Tab("review", "Review", "/review"),
    Tab("quarantine", "Quarantine", "/quarantine"),
)


@cache
def compiled_templates() -> Environment:
    """Return the templates of the tabs, compiled, so that the first page takes no longer than the next."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "age": age}
    for template in TEMPLATES.glob("*.html"):
        environment.get_template(template.name)
    return environment


class Dashboard:
    """What the tabs of the page share. *store* connects at its first use."""

    def __init__(
        self, settings: Settings, service_settings: ServiceSettings, deadlines: Deadlines, taxonomy: Taxonomy
    ) -> None:
        """Compile the templates; connect to nothing."""
        settings = with_little_patience(settings)
        self.store = DocumentStore(settings)
        self.settings = settings
        self.shows_text = service_settings.dashboard_show_text
        self.runs = Runs(self.store.database, settings.results_collection)
        self.quarantine = open_quarantine(self.store, settings, service_settings.dashboard_batch_files_dir)
        self.orders = self.store.database.get_collection(
            order_log.collection_name(settings.results_collection), write_concern=DURABLE
        )
        self.labels = LabelsTab(self.store, settings, taxonomy, load_report_settings())
        self._deadlines = deadlines
        self._templates = compiled_templates()
        self.files = {name: (TEMPLATES / name).read_bytes() for name in ("dashboard.css", "dashboard.js", "labels.js")}

    def render(self, template: str, path: str, **values: Any) -> str:
        """Return the HTML of ``<template>.html``.

        *path* is that of the page. The template gets ``root``, the relative address of ``/dashboard`` on it, because a
        proxy may add a prefix.
        """
        root = "../" * (path.count("/") - 1) + DASHBOARD.lstrip("/")
        return self._templates.get_template(f"{template}.html").render(root=root, tabs=TABS, **values)

    async def within(self, deadline: float, work: Awaitable[T]) -> T:
        """Return the result of *work* within the *deadline* of a request. Raises RequestError."""
        return await self._deadlines.until(deadline, work)


def open_dashboard(
    settings: Settings, service_settings: ServiceSettings, deadlines: Deadlines, stack: AsyncExitStack
) -> Dashboard | None:
    """Return the parts of the page, which *stack* closes; None if API_EXPOSE_DASHBOARD is ``off``.

    Raises:
        ConfigurationError: MONGODB_URI, the taxonomy or a REPORT_* setting is wrong.
    """
    if service_settings.expose_dashboard == "off":
        return None
    dashboard = Dashboard(settings, service_settings, deadlines, load_taxonomy(settings.taxonomy_file))
    stack.push_async_callback(dashboard.store.close)
    stack.push_async_callback(dashboard.labels.close)
    return dashboard
