"""``cli.py report`` with a real MongoDB, and its page in a headless Chromium."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from tests.analytics.made_results import (
    START,
    correction,
    random_corrections,
    random_failures,
    random_results,
    result,
)
from tests.forked_process import Ended
from tests.in_process import run_cli
from tests.service.chromium import NAMES
from tests.worker.site import Site, open_site

Place = Database[dict[str, Any]]
HOSTILE = "</title><script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(1)>"
LABELS = {"intent": "Complaint", "topic": "Other", "sentiment": "Negative"}
CANARY = "quotes the customer"  # of the categorization in results


@pytest.fixture
def place(mongodb_uri: str, db_name: str, tmp_path: Path) -> Iterator[Site]:
    """Return a site without a model server."""
    with open_site(mongodb_uri, db_name, None, tmp_path) as opened:
        yield opened


def report(site: Site, *flags: str, **settings: str) -> Ended:
    return Ended(*run_cli(["report", "--output", "report.html", *flags], site.environment(**settings), site.folder))


def page_of(site: Site) -> str:
    return (site.folder / "report.html").read_text(encoding="utf-8")


def fill(database: Place, results: list[dict[str, Any]], share: float = 0.2) -> None:
    database.sentimental_analysis.create_index("source_conversation_id", unique=True)
    database.sentimental_analysis.insert_many(results)
    database.sentimental_analysis_corrections.insert_many(random_corrections(results, share))
    database.conversation_set.insert_many(random_failures(30))


def test_report_shows_shares_weeks_channels_changes_and_provenance(place: Site, database: Place) -> None:
    fill(database, random_results(400))
    ended = report(place)
    assert ended.code == 0
    assert ended.out.startswith(f"400 results of {database.name}.sentimental_analysis, times in UTC.\n")
    assert "Most frequent intent: " in ended.out
    page = page_of(place)
    for wanted in ("Shares of intent", "topic by week", "sentiment by channel", "sentiment by topic, % of each row"):
        assert f"<figcaption>{wanted}</figcaption>" in page
    for wanted in ("2026-W36", "Holm", "label_outside", "skipped_no_text", "c0ffeec0ffee", "qwen3:8b", "web form"):
        assert wanted in page
    assert CANARY not in page
    assert "no answer within" not in page


def test_week_after_an_outage_is_a_significant_change(place: Site, database: Place) -> None:
    before = [
        result(LABELS | {"sentiment": "Positive"}, START, confidence=0.9 if number else None) for number in range(60)
    ]
    after = [result(LABELS, START + timedelta(days=7), confidence=0.5) for _ in range(40)]
    database.sentimental_analysis.insert_many([*before, *after])
    ended = report(place)
    assert "2 significant changes against the period before." in ended.out
    assert " 1 result has none." in page_of(place)
    rows = re.findall(r'<tr class="significant">.*?</tr>', page_of(place))
    assert [re.findall(r"<td[^>]*>(.*?)</td>", row)[:4] for row in rows] == [
        ["Negative", "0.0 %", "100.0 %", "+100.0"],
        ["Positive", "100.0 %", "0.0 %", "-100.0"],
    ]


def test_corrections_of_one_period_are_no_change(place: Site, database: Place) -> None:
    """The model gave the same labels in both; people have corrected those of the later one only."""
    results = [result(LABELS, START + timedelta(days=7 * (number % 2))) for number in range(80)]
    database.sentimental_analysis.insert_many(results)
    corrections = [correction(one, "sentiment", "Neutral") for one in results[1::2]]
    database.sentimental_analysis_corrections.insert_many(corrections)
    ended = report(place)
    assert "40 conversations with labels decided by people; these count." in ended.out
    assert "0 significant changes against the period before." in ended.out
    assert "without corrections" in page_of(place)


def test_wrong_date_in_the_future_leaves_changes_and_charts(place: Site, database: Place) -> None:
    days_ago = (2, 9, -60_000)
    database.sentimental_analysis.insert_many(
        [result(LABELS, datetime.now(UTC) - timedelta(days=days)) for days in days_ago]
    )
    assert report(place).code == 0
    page = page_of(place)
    assert "against the period of equal length before" in page
    assert "219" not in "".join(re.findall(r'<th scope="row">(\d{4}-W\d\d)</th>', page))


def test_period_is_in_the_time_zone_and_a_date_includes_its_day(place: Site, database: Place) -> None:
    """22:00 UTC on August 31 is midnight in Berlin."""
    hours = (21.9, 22, 45.9, 46)
    database.sentimental_analysis.insert_many([result(LABELS, START + timedelta(hours=hour)) for hour in hours])
    day = ("--since", "2026-09-01", "--until", "2026-09-01")
    assert report(place, *day, "--time-zone", "Europe/Berlin").out.startswith("2 results of")
    assert "Time zone: Europe/Berlin" in page_of(place)
    assert report(place, *day, "--by", "day", REPORT_TIME_ZONE="Asia/Tokyo").out.startswith("2 results of")
    assert "topic by day" in page_of(place)
    assert report(place, "--since", "2026-09-01T21:59+00:00").out.startswith("1 result of")


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="requirements-evaluation.txt is not installed")
def test_control_sample_corrects_the_shares(place: Site, database: Place) -> None:
    """The model says Negative for all; people say Positive for half of a random sample."""
    results = [result(LABELS) for _ in range(400)]
    decisions = [
        correction(one, "sentiment", ("Negative", "Positive")[number % 2], sampling_probability=0.1)
        for number, one in enumerate(results[:80])
    ]
    database.sentimental_analysis.insert_many(results)
    database.sentimental_analysis_corrections.insert_many(decisions)
    report(place)
    assert "80 conversations of the control sample" in page_of(place)
    assert re.search(r">Negative</th><td>50\.0 %</td><td>3\d\.\d % to 6\d\.\d %</td><td>360</td>", page_of(place))


def test_small_control_sample_is_not_used_and_named(place: Site, database: Place) -> None:
    one = result(LABELS)
    database.sentimental_analysis.insert_one(one)
    database.sentimental_analysis_corrections.insert_one(correction(one, "topic", "Other", sampling_probability=1))
    report(place)
    assert "The shares of topic are not corrected by gold labels: the control sample has only 1 of the 30" in page_of(
        place
    )


def test_hostile_labels_and_channels_stay_texts(place: Site, database: Place) -> None:
    hostile = dict.fromkeys(LABELS, HOSTILE)
    database.sentimental_analysis.insert_one(
        result(hostile, channel=HOSTILE, model=HOSTILE, conversation_number=HOSTILE)
    )
    ended = report(place)
    assert ended.code == 0
    assert not re.search("<(script|img)", page_of(place))
    assert page_of(place).count("</title>") == 1 + page_of(place).count("<title>") - 1


def test_collection_without_results_is_named(place: Site) -> None:
    ended = report(place)
    assert (ended.code, "has no results.\n" in ended.err) == (1, True)
    assert "No result has this field." in page_of(place)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--since", "yesterday"), "must be a date or a time"),
        (("--until", "2026-W48"), "must be a date or a time"),  # Python takes it for the Monday
        (("--since", "2026-09-02", "--until", "2026-09-01"), "is not before --until"),
        (("--until", "9999-12-31"), "need years"),
        (("--time-zone", "Mars/Olympus"), "REPORT_TIME_ZONE: must be a time zone"),
        (("--output", "missing/report.html"), "--output"),
    ],
)
def test_wrong_flags_are_one_sentence(place: Site, flags: tuple[str, ...], wanted: str) -> None:
    ended = report(place, *flags)
    assert ended.code == 2
    assert wanted in ended.err
    assert not (place.folder / "report.html").exists()


PHONE = {"width": 360, "height": 700}
IS_NARROW = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless Chromium; skip where it or Playwright is missing. Its event loop is in the way of ``run_cli``."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def seen(browser: Any, address: str, **settings: Any) -> tuple[Any, list[str], list[str]]:
    """Return the page, the problems of scripts and widths, and the addresses of requests."""
    page = browser.new_page(**settings)
    problems: list[str] = []
    addresses: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach((one, place) => { one.open = place < 2 })")
    if not page.evaluate(IS_NARROW):
        problems.append("wider than the screen")
    return page, problems, addresses


def objections(page: Any, *rules: str) -> list[tuple[str, list[str]]]:
    """Return what axe objects to, by *rules* or by all."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page, options={"runOnly": list(rules)} if rules else None).response["violations"]
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


@pytest.mark.thorough
def test_page_in_a_browser_and_on_paper(place: Site, database: Place) -> None:
    """No script error and no request, no wider than a phone; on paper dark ink on white, and no closed tables."""
    results = random_results(40)
    results[0]["classification"]["topic"] = results[1]["conversation"]["channel"] = HOSTILE
    fill(database, results)
    report(place)
    address = (place.folder / "report.html").as_uri()
    with chromium() as browser:
        page, problems, addresses = seen(browser, address, viewport=PHONE, color_scheme="dark")
        assert (problems, addresses) == ([], [address])
        page.emulate_media(media="print")
        style = "getComputedStyle(document.body)"
        assert page.evaluate(f"[{style}.color, {style}.backgroundColor]") == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
        assert page.locator("figure.chart details").last.is_hidden()
        assert page.pdf().startswith(b"%PDF")


@pytest.mark.thorough
def test_page_is_accessible(place: Site, database: Place) -> None:
    """All rules of axe in the light, the contrast in the dark."""
    fill(database, random_results(200))
    report(place)
    address = (place.folder / "report.html").as_uri()
    with chromium() as browser:
        assert objections(seen(browser, address)[0]) == []
        assert objections(seen(browser, address, color_scheme="dark")[0], "color-contrast") == []
