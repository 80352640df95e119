"""Charts are well-formed, escape what they show, and have the same figures as their tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from analytics import charts
from analytics.charts import Bar, Chart, Series
from analytics.periods import MOST, first_day, period_named, shown_periods
from analytics.svg import SERIES, patterns

HOSTILE = "<script>alert(1)</script>\" onload='x' ]]> \x00\u202e& </svg>" + "x" * 500
Draw = Callable[[str], Chart]
KINDS: dict[str, Draw] = {
    "bars": lambda name: charts.bars(name, [Bar(name, 0.4, 0.3, 0.5, name), Bar("B", 0.1)], detail=name),
    "lines": lambda name: charts.lines(
        name, [name, "w2"], [Series(name, [0.1, None]), Series("B", [0.3, 0.4])], [5, 0]
    ),
    "stacked": lambda name: charts.stacked(name, [name], [Series(name, [0.4]), Series("B", [None])]),
    "heat_map": lambda name: charts.heat_map(name, [name], ["X", name], {(name, "X"): 0.25}),
}


def parsed(chart: Markup | Chart) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart}</div>")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_stay_texts(kind: str) -> None:
    """No element, attribute or address comes from a name, and a long one is shortened in the drawing."""
    harmless, hostile = parsed(KINDS[kind]("A")), parsed(KINDS[kind](HOSTILE.replace("\x00", "")))
    shape = [(each.tag, sorted(each.attrib)) for each in harmless.iter()]
    assert [(each.tag, sorted(each.attrib)) for each in hostile.iter()] == shape
    assert all(len(each.text or "") <= 40 for each in hostile.iter("text"))


@pytest.mark.parametrize("kind", KINDS)
def test_chart_has_a_name_and_a_table(kind: str) -> None:
    chart = parsed(KINDS[kind]("Topics"))
    drawing = chart.find(".//svg")
    assert drawing is not None
    assert drawing.get("role") == "img"
    assert drawing.findtext("title") == "Topics"
    assert chart.findtext(".//caption") == "Topics"
    assert {each.get("scope") for each in chart.iter("th")} == {"row", "col"}


@pytest.mark.parametrize("kind", KINDS)
def test_chart_works_under_a_strict_policy(kind: str) -> None:
    """No style attribute, script or address, so that the page needs no exception for them."""
    for each in parsed(KINDS[kind]("A")).iter():
        assert each.tag not in ("script", "style", "image", "use", "a")
        assert not [name for name in each.attrib if name == "style" or name.startswith("on") or "href" in name]
        assert not re.search("https?:", "".join(each.attrib.values()))


def test_table_of_bars_has_what_is_drawn() -> None:
    chart = parsed(charts.bars("Topics", [Bar("A", 0.4, 0.3, 0.5, "40"), Bar("B", 0.1, 0.05, 0.2, "10")], detail="n"))
    cells = [[cell.text for cell in row] for row in chart.iter("tr")]
    assert cells == [
        ["label", "share", "95 % interval", "n"],
        ["A", "40.0 %", "30.0 % to 50.0 %", "40"],
        ["B", "10.0 %", "5.0 % to 20.0 %", "10"],
    ]


def test_series_differ_without_colour() -> None:
    """Each has its own pattern, and its own pair of dashes and mark."""
    drawings = [
        each.find("path").get("d") if each.find("path") is not None else ""
        for each in parsed(patterns()).iter("pattern")
    ]  # type: ignore[union-attr]
    assert len(set(drawings)) == len(drawings) == SERIES
    marks = {each.get("id"): each.find("path").get("d") for each in parsed(patterns()).iter("marker")}  # type: ignore[union-attr]
    assert len(set(marks.values())) == SERIES
    chart = parsed(charts.lines("t", ["1"], [Series(str(number), [0.1]) for number in range(SERIES)]))
    used = {each.get("marker-mid") for each in chart.iter("path") if "line" in (each.get("class") or "")}
    assert used == {f"url(#{name})" for name in marks}


def test_line_has_a_gap_where_there_are_no_results() -> None:
    chart = parsed(charts.lines("t", ["1", "2", "3"], [Series("A", [0.1, None, 0.2])]))
    path = next(each.get("d") or "" for each in chart.iter("path") if "line" in (each.get("class") or ""))
    assert (path.count("M"), path.count("l")) == (2, 0)


def test_charts_of_nothing_are_drawn() -> None:
    for chart in (
        charts.bars("t", []),
        charts.lines("t", [], []),
        charts.stacked("t", [], []),
        charts.heat_map("t", [], [], {}),
    ):
        parsed(chart)


def test_more_series_than_can_be_told_apart_are_in_the_table_only() -> None:
    series = [Series(f"L{number}", [0.1]) for number in range(SERIES + 3)]
    chart = parsed(charts.lines("t", ["1"], series))
    assert len(list(chart.iter("th"))) == len(series) + 2
    assert "L9" not in [each.text for each in chart.iter("text")]


def test_periods_without_results_are_shown() -> None:
    assert shown_periods(["2020-W53", "2021-W02"], "week") == ["2020-W53", "2021-W01", "2021-W02"]
    assert shown_periods(["2024-02-29", "2024-03-01"], "day") == ["2024-02-29", "2024-03-01"]
    assert shown_periods([], "day") == []


def test_one_odd_date_does_not_make_a_chart_of_a_thousand_years() -> None:
    shown = shown_periods(["0001-W02", "2026-W40"], "week")
    assert (len(shown), shown[-1]) == (MOST["week"], "2026-W40")
    assert shown_periods(["9998-12-31"], "day") == ["9998-12-31"]
    assert shown_periods(["2026-W39", "2026-W40", "2199-W01"], "week") == ["2026-W39", "2026-W40"]


@pytest.mark.parametrize("day", ["2026-12-31", "2027-01-03", "2024-12-30", "0001-01-03"])
def test_names_of_weeks_are_those_of_mongodb(day: str) -> None:
    """%G-W%V, whose year is that of the Thursday."""
    name = period_named(date.fromisoformat(day), "week")
    assert first_day(name) <= date.fromisoformat(day)
    assert re.fullmatch(r"\d{4}-W\d\d", name)
