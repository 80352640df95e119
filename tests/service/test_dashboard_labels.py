"""The tab Labels over HTTP: counts, filters, examples, intervals, and what it hides."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from tests.review.review_site import TEXT, fill, result
from tests.service.service_process import NO_MODEL, ServiceProcess, serve

Data = Database[dict[str, Any]]
ANNA = "anna-key-0123456789abcd"
KEY = {"X-API-Key": ANNA}
START = datetime(2026, 6, 1, 12, tzinfo=UTC)
CORRECTIONS = "sentimental_analysis_corrections"


def at(number: int, channel: str | None, confidence: float, **labels: Any) -> dict[str, Any]:
    """Return a result of a conversation that ended *number* days after START."""
    facts = {"last_message_at": START + timedelta(days=number), "channel": channel, "turns": 2}
    return {**result(number, confidence, **labels), "conversation": facts}


RESULTS = [
    at(1, "email", 0.2),
    at(2, "email", 0.6, topic="Other"),
    at(9, "chat", 0.8, intent="Refund Request"),
    at(10, None, 0.9, intent="Refund Request", sentiment="Neutral"),
]


@pytest.fixture
def service(tmp_path: Path, mongodb_uri: str, db_name: str, database: Data) -> Iterator[ServiceProcess]:
    """A service with four results of two weeks."""
    fill(database, RESULTS)
    settings = {"API_KEYS": f"anna:{ANNA}", **NO_MODEL, "API_EXPOSE_DASHBOARD": "key"}
    with serve(tmp_path, **settings, MONGODB_URI=mongodb_uri, MONGODB_DB=db_name) as process:
        yield process


def page(service: ServiceProcess, path: str) -> str:
    """Return the page at *path* as soon as it is computed."""
    end = time.monotonic() + 20
    while (answer := service.get(f"/dashboard{path}", KEY)).status == 202:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert answer.status == 200, answer.body
    return answer.body.decode()


def row(html: str, name: str) -> list[str]:
    """Return the cells of the first table row that *name* heads."""
    found = re.search(rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', html)
    assert found, name
    return re.findall(r"<td>(.*?)</td>", found[1])


def correct(number: int, field: str, was: str, to: str, probability: float | None = None) -> dict[str, Any]:
    decision = {"source_conversation_id": number, "field": field, "from": was, "to": to, "reviewer": "anna"}
    sampled = {} if probability is None else {"sampling_probability": probability}
    return {**decision, "at": datetime.now(UTC), "source": "random", **sampled}


def test_first_page_has_filters_and_asks_mongodb_for_nothing(tmp_path: Path) -> None:
    away = {"MONGODB_URI": "mongodb://127.0.0.1:1", "MONGODB_TIMEOUT_MS": "200", "MONGODB_BACKOFF_S": "0"}
    with serve(tmp_path, **NO_MODEL, API_EXPOSE_DASHBOARD="key", **away) as service:
        answer = service.get("/dashboard/labels?channel=email&label.topic=Other")
        assert answer.status == 200
        assert b'data-source="../dashboard/charts?channel=email&amp;label.topic=Other"' in answer.body
        assert len(answer.body) < 50_000
        assert b"<script>" not in answer.body
        while (answer := service.get("/dashboard/charts")).status == 202:
            time.sleep(0.02)
        assert answer.status == 503
        assert b"MongoDB does not answer" in answer.body


def test_charts_show_labels_by_week_and_channel_with_tables(service: ServiceProcess) -> None:
    html, tables = page(service, "/charts"), page(service, "/tables")
    assert "4 results, counted at" in html
    assert [row(tables, "Complaint")[place] for place in (0, -1)] == ["50.0 %", "2"]
    assert row(tables, "2026-W23") == ["2", "100.0 %", "0.0 %"]
    assert row(tables, "2026-W24") == ["2", "0.0 %", "100.0 %"]
    assert row(tables, "email (2)") == ["100.0 %", "0.0 %"]
    assert "no channel" in html
    assert html.count('role="img"') == tables.count("<table>") == 12
    links = re.findall(r'href="tables\?#(table-\w+)" data-table="\1"', html)
    assert links == re.findall(r'<figure class="chart" id="(table-\w+)">', tables)
    assert "style=" not in html + tables


def test_filters_are_applied_and_kept_in_the_links(service: ServiceProcess) -> None:
    assert "2 results, counted" in page(service, "/charts?channel=email")
    assert "1 result, counted" in page(service, "/charts?no_channel=1")
    assert "2 results, counted" in page(service, "/charts?since=2026-06-08&until=2026-06-11")
    assert "1 result, counted" in page(service, "/charts?min=0.85")
    assert "0 results, counted" in page(service, "/charts?model=another")
    html = page(service, "/charts?label.intent=Refund+Request&by=day")
    assert "2 results, counted" in html
    assert row(page(service, "/tables?label.intent=Refund+Request&by=day"), "2026-06-10") == ["1", "100.0 %"]
    assert "labels?by=day&amp;label.intent=Refund+Request&amp;label.topic=Shipping%2FDelivery" in html
    assert 'aria-label="Remove the filter intent: Refund Request"' in html
    form = service.get("/dashboard/labels?no_channel=1&label.topic=Of+an+earlier+taxonomy", KEY).body.decode()
    assert '<input type="hidden" name="no_channel" value="1">' in form
    assert "<option selected>Of an earlier taxonomy</option>" in form
    wrong = service.get("/dashboard/charts?min=2", KEY)
    assert (wrong.status, wrong.error) == (422, "ValidationError")


def test_corrections_win(service: ServiceProcess, database: Data) -> None:
    database[CORRECTIONS].insert_one(correct(1, "intent", "Complaint", "Account Access"))
    html = page(service, "/tables")
    for label in ("Complaint", "Account Access"):
        assert [row(html, label)[place] for place in (0, -1)] == ["25.0 %", "1"]


def test_shares_have_intervals_where_the_control_sample_has_gold(service: ServiceProcess, database: Data) -> None:
    """A third of the reviewed conversations was labelled wrong, so the estimate is not the share of the model."""
    fill(database, [at(number, "email", 0.5, intent="Refund Request") for number in range(20, 60)])
    decided = [(number, "Refund Request" if number % 3 else "Complaint") for number in range(20, 50)]
    database[CORRECTIONS].insert_many(
        [correct(number, "intent", "Refund Request", label, 0.02) for number, label in decided]
    )
    html = page(service, "/charts")
    assert "and 30 labels of the random control sample" in html
    share, interval, results = row(page(service, "/tables"), "Complaint")
    low, high = (float(part.split()[0]) for part in interval.split(" to "))
    assert low <= float(share.split()[0]) <= high
    assert high - low > 10
    assert results == "12"
    assert "control sample that people" not in page(service, "/charts?label.topic=Other")


def test_examples_have_ids_and_labels_and_no_text(service: ServiceProcess, database: Data) -> None:
    html = page(service, "/examples/confidence")
    assert [int(name) for name in re.findall(r'<th scope="row">(\d+)</th>', html)] == [1, 2, 9, 10]
    assert row(html, "1") == [
        *("1", "2026-06-02 12:00", "Complaint", "Shipping/Delivery", "Negative", "0.20", "llama3.2", "model")
    ]
    assert TEXT not in html
    assert "DASHBOARD_SHOW_TEXT=true" in html
    assert re.findall(r'row">(\d+)<', page(service, "/examples/newest?channel=email")) == ["2", "1"]
    assert service.get("/dashboard/examples/oldest", KEY).status == 422
    assert TEXT not in service.log


def test_text_of_examples_is_shown_if_the_setting_allows_it(
    tmp_path: Path, mongodb_uri: str, db_name: str, database: Data
) -> None:
    fill(database, RESULTS[:1])
    database["conversation_set"].update_one({"_id": 1}, {"$set": {"messages.0.text": "1 < 2 & <b>hostile"}})
    place = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name, "DASHBOARD_SHOW_TEXT": "true"}
    with serve(tmp_path, **NO_MODEL, API_EXPOSE_DASHBOARD="key", **place) as service:
        html = page(service, "/examples/newest")
        assert "1 &lt; 2 &amp; &lt;b&gt;hostile" in html
        assert "hostile" not in page(service, "/charts")
        assert "hostile" not in service.log


def test_hostile_labels_and_channels_are_only_text(service: ServiceProcess, database: Data) -> None:
    hostile = "<script>alert(1)</script>"
    database["sentimental_analysis"].update_many(
        {}, {"$set": {"classification.intent": hostile, "conversation.channel": hostile}}
    )
    for path in ("/charts", "/examples/newest"):
        html = page(service, path)
        assert "<script>alert" not in html
        assert "&lt;script&gt;" in html
    database["sentimental_analysis"].update_many(
        {}, {"$set": {"classification.intent": "x" * 201, "conversation.channel": "a\nb"}}
    )
    html = page(service, "/charts?min=0")
    for shown in ("x" * 198 + "…", "a b…"):  # a filter would find nothing
        assert f"<li>{shown} 4</li>" in html


def test_labels_require_a_key(service: ServiceProcess) -> None:
    for path in ("labels", "charts", "tables", "examples/newest", "charts.css", "labels.js"):
        assert service.get(f"/dashboard/{path}").error == "AuthenticationError"
        assert service.get(f"/dashboard/{path}", KEY).status in (200, 202)
