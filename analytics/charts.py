"""Charts as inline SVG, each with the same figures as a table. Pure: no script, no request, no style attribute.

A page with charts has ``STYLE`` in its style sheet and ``svg.patterns()`` once in its body. Labels may be hostile: every
text is escaped, and shortened in the drawing; the table has it whole.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from analytics.svg import SERIES, element, fill, mark, number, table
from domain.text import one_line

WIDTH, ROW, LEFT, RIGHT = 520.0, 24.0, 170.0, 84.0
PLOT = WIDTH - LEFT - RIGHT
LINE_HEIGHT, LINE_LEFT = 220.0, 40.0
SHADES = 12  # of a heat map
MOST_MARKED = 60  # points of a line with marks
NAME_CHARACTERS, LEGEND_CHARACTERS = 20, 28
NONE = "–"

STYLE = """
:root { --ink: #1b1f24; --paper: #fff; --rule: #c9d0d8; --soft: #eef2f7; --s0: #2f6fbe; --s1: #f0a35c; --s2: #74b39a;
  --s3: #d9d36a; --s4: #b59ad0; --s5: #e58f92; --s6: #8fc6e8; --s7: #c8c8c8; --heat: 47 111 190;
  --l0: #1f5fae; --l1: #b45309; --l2: #1a7a5a; --l3: #7d6b00; --l4: #7a4fb0; --l5: #b8323a; --l6: #1d7fa6; --l7: #5f6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181d; --rule: #47515e; --soft: #20262e;
  --s0: #5d97e0; --s1: #b4692a; --s2: #3d7d64; --s3: #8b8530; --s4: #75589a; --s5: #a4565a; --s6: #3f7899; --s7: #6b6b6b;
  --heat: 93 151 224;
  --l0: #7fb2f5; --l1: #f0a35c; --l2: #74c7a5; --l3: #d9d36a; --l4: #c3a6e6; --l5: #f29498; --l6: #8fd0f0; --l7: #b9c0c8; } }
@media print { :root { --ink: #000; --paper: #fff; --rule: #888; --soft: #fff; --s0: #7ba3d6; --s1: #f4c08f; --s2: #a9d3c2;
  --s3: #ece8a8; --s4: #d3c3e4; --s5: #f0bbbd; --s6: #bfdff3; --s7: #e0e0e0; --heat: 47 111 190;
  --l0: #1f5fae; --l1: #b45309; --l2: #1a7a5a; --l3: #7d6b00; --l4: #7a4fb0; --l5: #b8323a; --l6: #1d7fa6; --l7: #5f6670; } }
figure.chart { margin: 1rem 0; max-width: 44rem; break-inside: avoid; }
figure.chart > svg { display: block; width: 100%; height: auto; }
figure.chart figcaption { font-weight: 600; }
figure.chart text { fill: var(--ink); font: 13px system-ui, sans-serif; }
figure.chart .small, figure.chart .small text { font-size: 11px; }
figure.chart .axis { stroke: var(--rule); }
figure.chart .outline { stroke: var(--ink); stroke-width: .75; }
figure.chart .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
figure.chart .line { fill: none; stroke-width: 2; }
.l1, .l5 { stroke-dasharray: 7 3; } .l2, .l6 { stroke-dasharray: 2 3; } .l3, .l7 { stroke-dasharray: 9 3 2 3; }
figure.chart .dot { stroke: var(--paper); stroke-width: .5; }
svg.defs { position: absolute; }
.ink { stroke: var(--ink); stroke-width: 1; fill: none; }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); }
.s4 { fill: var(--s4); } .s5 { fill: var(--s5); } .s6 { fill: var(--s6); } .s7 { fill: var(--s7); }
.l0 { stroke: var(--l0); } .l1 { stroke: var(--l1); } .l2 { stroke: var(--l2); } .l3 { stroke: var(--l3); }
.l4 { stroke: var(--l4); } .l5 { stroke: var(--l5); } .l6 { stroke: var(--l6); } .l7 { stroke: var(--l7); }
.m0 { fill: var(--l0); } .m1 { fill: var(--l1); } .m2 { fill: var(--l2); } .m3 { fill: var(--l3); }
.m4 { fill: var(--l4); } .m5 { fill: var(--l5); } .m6 { fill: var(--l6); } .m7 { fill: var(--l7); }
.heat { fill: rgb(var(--heat)); stroke: var(--rule); }
figure.chart summary { cursor: pointer; }
div.scroll { overflow-x: auto; }
figure.chart table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
figure.chart caption { text-align: left; }
figure.chart th, figure.chart td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--rule); text-align: left; }
figure.chart td { text-align: right; white-space: nowrap; }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A share (0 to 1) with its 95 % interval, if there is one; *detail* is shown beside it in the table."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """A share (0 to 1) at each place of an axis; None if there is nothing to divide by."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Chart:
    """A *drawing* and its table. As text and in a template, it is the whole figure."""

    title: str
    drawing: Markup
    table: Markup

    @property
    def anchor(self) -> str:
        """The id of its table, in a page with the tables of several charts."""
        return f"table-{zlib.crc32(self.title.encode()):08x}"

    def with_link(self, address: str) -> Markup:
        """Return the figure with a link instead of its table, which is on the page at *address*."""
        link = element("a", "Open the tables", href=f"{address}#{self.anchor}", data_table=self.anchor)
        return self._figure(element("p", link))

    def __html__(self) -> str:
        return self._figure(self.table)

    __str__ = __html__

    def _figure(self, below: Markup) -> Markup:
        details = element("details", element("summary", f"Table: {self.title}"), below)
        return element("figure", element("figcaption", self.title), self.drawing, details, class_="chart")


def percent(share: float | None) -> str:
    """Return *share* as a percentage, a dash for None."""
    return NONE if share is None else f"{100 * share:.1f} %"


def bars(title: str, rows: Sequence[Bar], *, detail: str = "") -> Chart:
    """Return horizontal bars with intervals; *detail* is the heading of the column of details."""
    top = scale_top([one.high or one.value for one in rows])
    shapes, whiskers, names, values = "", "", [], []
    for place, one in enumerate(rows):
        y = place * ROW
        names.append(_text(LEFT - 6, y + 16, one_line(one.name, NAME_CHARACTERS)))
        shapes += _rectangle(LEFT, y + 4, PLOT * one.value / top, ROW - 8)
        end = one.value
        if one.low is not None and one.high is not None:
            low, end, middle = LEFT + PLOT * one.low / top, one.high, y + ROW / 2
            high = LEFT + PLOT * end / top
            whiskers += f"M{low:.1f} {middle - 4:.0f}v8m0 -4H{high:.1f}m0 -4v8"
        values.append(_text(LEFT + PLOT * end / top + 6, y + 16, percent(one.value)))
    drawn = [
        element("g", *names, text_anchor="end"),
        element("path", d=shapes, fill=fill(0), class_="outline"),
        element("path", d=whiskers, class_="whisker"),
        *values,
    ]
    has_interval = any(one.low is not None for one in rows)
    head = ["label", "share", *(["95 % interval"] if has_interval else []), *([detail] if detail else [])]
    cells = []
    for one in rows:
        interval = NONE if one.low is None else f"{percent(one.low)} to {percent(one.high)}"
        cells.append(
            [one.name, percent(one.value), *([interval] if has_interval else []), *([one.detail] if detail else [])]
        )
    return _chart(title, drawn, ROW * len(rows) + 4, table(title, head, cells))


def lines(title: str, places: Sequence[str], series: Sequence[Series], totals: Sequence[int] = ()) -> Chart:
    """Return a line for each of *series* over *places*, in order; only the first SERIES are drawn, the table has all.

    *totals* are the numbers of results at the places, for the table.
    """
    drawn_series = series[:SERIES]
    top = scale_top([value for one in drawn_series for value in one.values if value is not None])
    bottom = LINE_HEIGHT - 20
    step = (WIDTH - LINE_LEFT - 12) / max(1, len(places) - 1)

    def x(place: int) -> float:
        return LINE_LEFT + step * place if len(places) > 1 else (LINE_LEFT + WIDTH) / 2

    heights = [bottom - (bottom - 10) * part / 4 for part in range(5)]
    scale = [_text(LINE_LEFT - 4, y + 4, f"{100 * top * part / 4:.3g} %", small=True) for part, y in enumerate(heights)]
    grid = "".join(f"M{LINE_LEFT:.0f} {number(y)}H{WIDTH:.0f}" for y in heights)
    drawn = [element("path", d=grid, class_="axis"), element("g", *scale, text_anchor="end")]
    every = math.ceil(len(places) / 6)
    drawn += [
        _text(x(place), bottom + 15, one_line(places[place], 12), anchor="middle" if place else "start", small=True)
        for place in range(0, len(places), max(1, every))
        if place + every <= len(places)
    ]
    for place, one in enumerate(drawn_series):
        points = [
            None if value is None else (x(across), bottom - (bottom - 10) * value / top)
            for across, value in enumerate(one.values)
        ]
        drawn.append(_line(points, place))
    rows = [
        [name, *([f"{totals[place]:,}"] if totals else []), *(percent(one.values[place]) for one in series)]
        for place, name in enumerate(places)
    ]
    head = ["period", *(["results"] if totals else []), *(one.name for one in series)]
    drawn += _legend([one.name for one in drawn_series], LINE_HEIGHT, is_line=True)
    return _chart(title, drawn, LINE_HEIGHT + _legend_height(len(drawn_series)), table(title, head, rows))


def stacked(title: str, places: Sequence[str], series: Sequence[Series]) -> Chart:
    """Return a bar of shares for each of *places*; shares of the series after the first SERIES are left blank."""
    width, names, frames, shapes = WIDTH - LEFT - 4, [], "", [""] * SERIES
    for place, name in enumerate(places):
        y, at = place * ROW, LEFT
        names.append(_text(LEFT - 6, y + 16, one_line(name, NAME_CHARACTERS)))
        frames += _rectangle(LEFT, y + 3, width, ROW - 6)
        total = sum(one.values[place] or 0.0 for one in series)
        for across, one in enumerate(series[:SERIES]):
            part = width * (one.values[place] or 0.0) / max(1.0, total)
            shapes[across] += _rectangle(at, y + 3, part, ROW - 6)
            at += part
    drawn = [element("g", *names, text_anchor="end"), element("path", d=frames, class_="outline", fill="none")]
    drawn += [
        element("path", d=shape, fill=fill(place), class_="outline") for place, shape in enumerate(shapes) if shape
    ]
    top = ROW * len(places) + 4
    drawn += _legend([one.name for one in series[:SERIES]], top)
    rows = [[name, *(percent(one.values[place]) for one in series)] for place, name in enumerate(places)]
    head = ["place", *(one.name for one in series)]
    return _chart(title, drawn, top + _legend_height(min(SERIES, len(series))), table(title, head, rows))


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    totals: Sequence[int] = (),
) -> Chart:
    """Return a grid of shares (0 to 1) of *rows* by *columns*, each written into its cell; absent ones are 0.

    *totals* are the numbers of results of the rows, for the table.
    """
    width, top = (WIDTH - LEFT) / max(1, len(columns)), 24.0
    most = max(values.values(), default=0.0) or 1.0
    heads = [
        _text(LEFT + width * (place + 0.5), 15, one_line(name, max(4, int(width / 7))))
        for place, name in enumerate(columns)
    ]
    names, figures, shapes = [], [], [""] * (SHADES + 1)
    for down, row in enumerate(rows):
        y = top + down * ROW
        names.append(_text(LEFT - 6, y + 16, one_line(row, NAME_CHARACTERS)))
        for across, column in enumerate(columns):
            value, x = values.get((row, column), 0.0), LEFT + across * width
            shapes[round(SHADES * value / most)] += _rectangle(x, y, width, ROW)
            figures.append(_text(x + width / 2, y + 16, f"{100 * value:.0f}"))
    drawn = [
        element("path", d=shape, class_="heat", fill_opacity=f"{0.6 * shade / SHADES:.2f}")  # the ink stays readable
        for shade, shape in enumerate(shapes)
        if shape
    ]
    drawn += [
        element("g", *names, text_anchor="end"),
        element("g", *heads, *figures, text_anchor="middle", class_="small"),
    ]
    cells = [
        [
            row,
            *([f"{totals[down]:,}"] if totals else []),
            *(percent(values.get((row, column), 0.0)) for column in columns),
        ]
        for down, row in enumerate(rows)
    ]
    head = ["row", *(["results"] if totals else []), *columns]
    return _chart(title, drawn, top + ROW * len(rows) + 4, table(title, head, cells))


def scale_top(values: Sequence[float]) -> float:
    """Return the end of an axis for *values*: a round number not below the largest; 1 at most, unless one is larger."""
    largest = max(values, default=0.0)
    rounds = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.6, 0.8, 1.0)
    return next((one for one in rounds if one >= largest), largest)


def _chart(title: str, drawn: Sequence[Markup], height: float, twin: Markup) -> Chart:
    title = one_line(title, 160)
    drawing = element("svg", element("title", title), *drawn, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img")
    return Chart(title, drawing, twin)


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    """Return a part of a path."""
    return f"M{number(x)} {number(y)}h{number(width)}v{number(height)}h{number(-width)}z"


def _text(x: float, y: float, text: str, *, anchor: str | None = None, small: bool = False) -> Markup:
    return element("text", text, x=float(x), y=float(y), text_anchor=anchor, class_="small" if small else None)


def _line(points: Sequence[tuple[float, float] | None], place: int) -> Markup:
    """Return the line through *points*, with a gap at None, in the dashes and with the marks of the series at *place*."""
    path, last = "", None
    for point in points:  # whole and relative numbers: a year of weeks is a third as long
        now = None if point is None else (round(point[0]), round(point[1]))
        if now is not None:
            path += (
                f"M{now[0]} {now[1]}" if last is None else f"l{now[0] - last[0]} {now[1] - last[1]}".replace(" -", "-")
            )
        last = now
    marks = mark(place, "start", "mid", "end") if path and len(points) <= MOST_MARKED else {}
    return element("path", d=path or "M0 0", class_=f"line l{place}", **marks)


def _legend_height(count: int) -> float:
    return 20.0 * math.ceil(count / 2) + 8


def _legend(names: Sequence[str], top: float, *, is_line: bool = False) -> list[Markup]:
    drawn: list[Markup] = []
    for place, name in enumerate(names):
        x, y = 4 + WIDTH / 2 * (place % 2), top + 6 + 20 * (place // 2)
        if is_line:
            sample = f"M{x:.0f} {y + 7:.0f}h12h12"
            drawn.append(element("path", d=sample, class_=f"line l{place}", **mark(place, "mid")))
        else:
            drawn.append(element("rect", x=x, y=float(y), width=24, height=14, fill=fill(place), class_="outline"))
        drawn.append(_text(x + 30, y + 12, one_line(name, LEGEND_CHARACTERS)))
    return drawn
