"""The filters of the tab Labels, in the query of its address."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from config import load_taxonomy
from error_handler import RequestError
from service.labels_query import LabelsQuery, labels_query

FULL = (
    "since=2026-06-01&until=2026-06-30&channel=e-mail+%26+web&model=llama3.2&min=0.25&max=0.5&by=day&label.topic=Other"
)


def parsed(query: str) -> LabelsQuery:
    return labels_query(query.encode(), load_taxonomy())


def test_view_is_in_its_address() -> None:
    """An address that is parsed gives the same address, so a view can be bookmarked."""
    view = parsed(FULL)
    assert (view.since, view.until) == (datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 7, 1, tzinfo=UTC))
    assert (view.channel, view.least, view.most, view.by) == ("e-mail & web", 0.25, 0.5, "day")
    for view in (parsed(FULL), parsed("min=0&max=1"), parsed("min=0.1234567")):
        assert parsed(view.address()[1:]) == view
    assert parsed("min=0&max=1").address() == "?min=0&max=1"
    assert view.is_filtered


def test_empty_values_are_no_filters() -> None:
    """A form sends all of its fields."""
    assert parsed("since=&until=&channel=&min=&label.topic=&by=day") == LabelsQuery(by="day")
    assert not parsed("by=day").is_filtered
    assert LabelsQuery().address() == "?"


def test_links_add_replace_and_remove_a_filter() -> None:
    view = parsed("label.topic=Other&channel=chat")
    assert parsed(view.with_label("intent", "Complaint")[1:]).labels == (("intent", "Complaint"), ("topic", "Other"))
    assert parsed(view.with_label("topic", "A & B")[1:]).labels == (("topic", "A & B"),)
    assert parsed(view.without_label("topic")[1:]) == LabelsQuery(channel="chat")
    assert parsed(view.address(channel=None)[1:]).channel is None
    assert parsed(view.address(channel="")[1:]).channel == ""
    assert parsed("no_channel=1&channel=chat").channel == "chat"  # the form keeps the first one


def test_bounds_of_the_confidence_may_be_open() -> None:
    """A result without confidence is in no range, so no bound must not become one."""
    assert parsed("").slice.confidence is None
    assert parsed("min=0.5").slice.confidence == (0.5, 1.0)
    assert parsed("max=0").slice.confidence == (0.0, 0.0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("since=yesterday", "since: must be a day"),
        ("until=0001-01-01", "until: must be between"),
        ("until=9999-12-31", "until: must be between"),
        ("since=2026-06-02&until=2026-06-01", "since: must not be after until"),
        ("min=nan", "min: must be a number"),
        ("max=1.5", "max: must be a number"),
        ("by=hour", "by: must be week or day"),
        ("topic=Secret", "an unknown parameter"),
        ("label.topic=A&label.topic=B", "twice"),
        ("channel=%ff", "not percent-encoded"),
        ("channel=" + "x" * 201, "channel: at most"),
    ],
)
def test_wrong_filters_are_named_and_not_quoted(query: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        parsed(query)
    assert refused.value.kind.status == 422
    assert query.rpartition("=")[2] not in str(refused.value)
