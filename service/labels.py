"""The figures behind the tab Labels, counted by MongoDB: labels by field, by time and channel, and by each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import tzinfo

from analytics.aggregates import LabelAnalytics, Order
from analytics.charts import Chart
from analytics.figures import Confidences, Example
from analytics.label_report import Crossing, FieldReport, crossed_fields, field_report
from analytics.report_page import confidence_chart, crossing_chart, field_charts
from analytics.slices import Period
from config import Settings, Taxonomy
from config.report_settings import ReportSettings
from domain.text import counted
from mongo_client import DocumentStore
from service.labels_query import LabelsQuery
from service.recent import Figures, Recent

LIMIT_S = 120.0  # for one pass over the results
EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class LabelsFigures:
    """All figures of a view, and their charts: those of each field, and those *together* of several.

    *notes* are sentences about what could not be computed. Charts are drawn once, because that takes longer than a page.
    """

    fields: Sequence[tuple[FieldReport, Sequence[Chart]]]
    together: Sequence[Chart]
    confidences: Confidences
    notes: Sequence[str]

    @property
    def n(self) -> int:
        """The number of results in the view."""
        return max((one.counts.total.n for one, _ in self.fields), default=0)

    @property
    def charts(self) -> list[Chart]:
        """All charts in the order of the page."""
        return [*(chart for _, drawn in self.fields for chart in drawn), *self.together]


class LabelsTab:
    """Figures and examples of each view, computed in the background."""

    def __init__(self, store: DocumentStore, settings: Settings, taxonomy: Taxonomy, charts: ReportSettings) -> None:
        self.taxonomy = taxonomy
        self.zone: tzinfo = charts.zone
        self.time_zone = charts.time_zone
        self._figures = Recent[LabelsQuery, LabelsFigures](self._compute)
        self._examples = Recent[tuple[LabelsQuery, Order], list[Example]](self._find)
        self._store = store
        self._analytics = LabelAnalytics(store, settings, taxonomy, charts.time_zone, LIMIT_S)
        self._progress: dict[LabelsQuery, str] = {}

    def last(self, query: LabelsQuery) -> Figures[LabelsFigures] | None:
        """Return the figures of *query*; None while the first ones are computed. See ``Recent.last``."""
        return self._figures.last(query)

    def last_examples(self, query: LabelsQuery, order: Order) -> Figures[list[Example]] | None:
        """Return up to EXAMPLES results of *query*; None while the first ones are looked up. See ``Recent.last``."""
        return self._examples.last((replace(query, by="week"), order))  # the step does not matter

    def progress(self, query: LabelsQuery) -> str:
        """Return how far the first figures of *query* are, such as ``3 fields done``; empty before they begin."""
        return self._progress.get(query, "")

    async def close(self) -> None:
        """Cancel what is being computed."""
        await self._figures.close()
        await self._examples.close()

    async def _compute(self, query: LabelsQuery) -> LabelsFigures:
        await self._store.check()  # a pass has much time, so it would notice late that MongoDB is away
        view, fields, crossings, notes = query.slice, list[FieldReport](), list[Crossing](), list[str]()

        def tell(done: int, total: int) -> None:
            self._progress[query] = f"{done:,} of {total:,} days done"

        try:
            if note := await self._analytics.refresh(view, tell):
                notes.append(note)
            for name in self.taxonomy.field_names:
                fields.append(await field_report(self._analytics, name, query.by, view, notes))
                self._progress[query] = f"{counted(len(fields), 'field')} done"
            for rows, columns in crossed_fields(fields):
                crossings.append(Crossing(rows, columns, *await self._analytics.crossed(rows, columns, view)))
                self._progress[query] = f"all fields and {counted(len(crossings), 'pair')} of fields done"
            confidences = await self._analytics.confidences(view)
            charts = await asyncio.to_thread(_drawn, fields, crossings, confidences, query.by)
            return LabelsFigures(*charts, confidences, notes)
        finally:
            self._progress.pop(query, None)

    async def _find(self, key: tuple[LabelsQuery, Order]) -> list[Example]:
        query, order = key
        await self._store.check()
        return await self._analytics.examples(query.slice, order, EXAMPLES)


def _drawn(
    fields: Sequence[FieldReport], crossings: Sequence[Crossing], confidences: Confidences, by: Period
) -> tuple[list[tuple[FieldReport, Sequence[Chart]]], list[Chart]]:
    together = [*map(crossing_chart, crossings), confidence_chart(confidences)]
    return [(one, field_charts(one, by)) for one in fields], [chart for chart in together if chart is not None]
