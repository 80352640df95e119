"""All pages of the service in one real browser: to start it takes longer than to visit each page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from config.taxonomy import DEFAULT_TAXONOMY
from tests.commands.test_quarantine import failed
from tests.review.review_site import AGREED, fill, result
from tests.service.chromium import Visit, visit
from tests.service.service_process import NO_MODEL, WITH_PHRASES, ServiceProcess, serve
from tests.service.test_dashboard import ANNA, WORKERS, worker
from tests.service.test_review_page import SHARES, corrections, shown
from utils.batch_file_manager import BatchFiles

Data = Database[dict[str, Any]]
HOSTILE = "1 < 2 <img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


@pytest.fixture
def settings(mongodb_uri: str, db_name: str) -> dict[str, str]:
    """The settings of a service with one caller."""
    return {"API_KEYS": f"anna:{ANNA}", **NO_MODEL, "MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name}


@pytest.fixture
def dashboard(tmp_path: Path, settings: dict[str, str], database: Data) -> Iterator[ServiceProcess]:
    """A service with a running worker, three results, and three documents in quarantine."""
    database[WORKERS].insert_one(worker(1, beat_at=datetime.now(UTC) + timedelta(hours=1)))  # it stays alive
    fill(database, [result(1, 0.2), result(2, 0.5), result(3, 0.8)])
    files = BatchFiles(tmp_path / "batch_files")
    files.save_failed("quarantine", 1, [failed("a", 1), failed("b", 3), failed("<script>alert(1)</script>", 4)])
    own = {"API_EXPOSE_DASHBOARD": "key", "DASHBOARD_BATCH_FILES_DIR": str(files.directory)}
    with serve(tmp_path, **settings, **own) as process:
        yield process


@pytest.fixture
def review(tmp_path: Path, settings: dict[str, str]) -> Iterator[ServiceProcess]:
    """A service with the review page alone; a field that may have several labels was added to the taxonomy."""
    taxonomy = tmp_path / "taxonomy.yaml"
    more = "\nfields: {tags: {labels: [Late, Lost, Damaged], multiple: true}}\n"
    taxonomy.write_text(DEFAULT_TAXONOMY.read_text(encoding="utf-8") + more, encoding="utf-8")
    own = {**settings, **SHARES, "TAXONOMY_FILE": str(taxonomy)}
    with serve(tmp_path, app=WITH_PHRASES, API_EXPOSE_REVIEW="key", **own) as process:
        yield process


@pytest.mark.slow
async def test_all_pages_work_by_keyboard_in_a_browser(
    dashboard: ServiceProcess, review: ServiceProcess, database: Data
) -> None:
    """The browser asks for the key. No script fails, and nothing is requested from elsewhere."""
    async with visit(ANNA) as seen:
        for look, service in ((runs, dashboard), (quarantine, dashboard), (labels, dashboard), (decisions, review)):
            seen.addresses.clear()
            seen.questions.clear()
            await look(seen, service.url, database)
            assert not seen.problems, look
            called = {re.sub(r"^(https?://[^/]+|data:).*", r"\1", one) for one in seen.addresses}
            assert called <= {service.url, "data:"}, look


async def runs(seen: Visit, url: str, database: Data) -> None:
    """Figures change without reloading. The focus stays on the button, also when Pause becomes Resume."""
    page = seen.page
    await page.goto(f"{url}/dashboard")
    await page.evaluate("window.isSamePage = true")
    database[WORKERS].update_one({"_id": "w1"}, {"$set": {"counts.processed": 77}})
    await page.get_by_text("77 of 100 documents").wait_for()
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
    await page.locator("#pause-w1").focus()
    await page.keyboard.press("Enter")
    await page.get_by_text("Pause: the worker obeys in a few seconds.").wait_for()
    await page.locator("#run-w1").get_by_text("Last order: pause, by anna").wait_for()
    stored = database[WORKERS].find_one_and_update({"_id": "w1"}, {"$set": {"status": "paused"}})
    assert [one["by"] for one in stored["orders"]] == ["anna"]
    await page.locator("#resume-w1").wait_for()
    assert await page.evaluate("document.activeElement.id") == "resume-w1"
    await page.locator("#stop-w1").focus()
    await page.keyboard.press("Enter")
    await page.locator("#run-w1").get_by_text("Last order: stop, by anna").wait_for()
    assert "the same command resumes it" in seen.questions[0]
    assert await page.evaluate("window.isSamePage")


async def quarantine(seen: Visit, url: str, _database: Data) -> None:
    """A change of many, and a drop, ask first."""
    page = seen.page
    await page.goto(f"{url}/dashboard/quarantine")
    assert not await seen.axe()
    await page.get_by_role("button", name="Replay document a", exact=True).press("Enter")
    await page.get_by_text("1 document released").wait_for()
    assert not seen.questions
    await page.get_by_role("link", name="b", exact=True).press("Enter")
    await page.get_by_role("heading", name="Failed document b").wait_for()
    await page.wait_for_load_state()
    assert not await seen.axe()
    await page.get_by_role("button", name="Drop document b").press("Enter")
    await page.get_by_text("1 document dropped").wait_for()
    await page.wait_for_load_state()  # the script that asks is there
    await page.get_by_role("button", name="Replay all failed documents").press("Enter")
    await page.get_by_text("1 document released").wait_for()
    assert seen.questions == ["Drop document b from quarantine for good?", "Replay all failed documents?"]


async def labels(seen: Visit, url: str, _database: Data) -> None:
    """The first page has no chart; the script asks for them. Each chart has a table, and links work behind a prefix."""
    page = seen.page
    await page.goto(f"{url}/dashboard/labels")
    await page.get_by_text("3 results, counted").wait_for()
    assert not await seen.axe()
    drawings = await page.get_by_role("img").count()
    tables = page.get_by_text(re.compile("^Table: "))
    assert await tables.count() == drawings >= 4
    await tables.first.press("Enter")
    await page.get_by_role("cell", name="100.0 %").first.wait_for()
    await page.get_by_role("link", name="Complaint", exact=True).press("Enter")
    await page.get_by_label("Remove the filter intent: Complaint").wait_for()
    await page.get_by_role("link", name="least confident").press("Enter")
    await page.get_by_role("row", name=re.compile("Complaint")).first.wait_for()
    assert page.url == f"{url}/dashboard/examples/confidence?label.intent=Complaint"
    assert not await seen.axe()
    await page.get_by_text("Filter", exact=True).press("Enter")
    await page.get_by_label("Channel").fill("nowhere")
    await page.get_by_role("button", name="Show").press("Enter")
    await page.get_by_text("No result is in this view").wait_for()
    assert "channel=nowhere" in page.url


async def decisions(seen: Visit, url: str, database: Data) -> None:
    """Accept, correct, note, skip and undo; a hostile text is only text."""
    hostile = {"$set": {"messages.0.text": HOSTILE, "conversation_number": "1"}}
    database["conversation_set"].update_one({"_id": 1}, hostile)
    page, keys = seen.page, seen.page.keyboard
    await page.goto(f"{url}/review")
    await shown(seen, 1)
    assert HOSTILE in await page.locator("#turns li").first.inner_text()
    pressed = await page.locator("[aria-pressed=true]").evaluate_all("all => all.map(one => one.dataset.label)")
    assert pressed == list(AGREED.values())
    await keys.press("3")  # the third intent of the taxonomy
    await keys.press("n")
    await keys.insert_text("asks n, s and u")
    await keys.press("Enter")
    await keys.press("Enter")
    await shown(seen, 2)
    first = [one for one in corrections(database) if one["source_conversation_id"] == 1]
    assert [(one["field"], one["from"] == one["to"], one["note"]) for one in first] == [
        ("intent", False, "asks n, s and u"),
        ("sentiment", True, "asks n, s and u"),
        ("topic", True, "asks n, s and u"),
    ]
    await keys.press("u")
    await shown(seen, 1)
    assert not corrections(database)
    await page.locator("#accept").click()  # a finger
    await shown(seen, 2)
    await keys.press("s")
    await shown(seen, 3)
    for label in ("Late", "Lost", "Damaged", "Late"):
        await page.locator(f"[data-field=tags] [data-label={label}]").click()
    await page.locator("#decision legend").first.click()  # the focus leaves the buttons
    await keys.press("Enter")
    await page.locator("#review-status").get_by_text("No conversation is left").wait_for()
    assert await page.title() == "Review labels"
    assert {one["reviewer"] for one in corrections(database)} == {"anna"}
    assert [one["to"] for one in corrections(database) if one["field"] == "tags"] == [["Lost", "Damaged"]]
