"""The tab Runs of /dashboard in a real browser: live figures, orders by keyboard, a phone, light and dark, axe."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from pymongo.database import Database

from tests.service.chromium import visit
from tests.service.service_process import NO_MODEL, ServiceProcess, serve
from tests.service.test_dashboard import ANNA, WORKERS, worker

Data = Database[dict[str, Any]]


@pytest.fixture
def service(tmp_path: Path, mongodb_uri: str, db_name: str, database: Data) -> Iterator[ServiceProcess]:
    """A service with a running, a paused and a lost worker, and an ended run."""
    later = {"beat_at": datetime.now(UTC) + timedelta(hours=1)}  # it stays alive
    order = {"action": "pause", "by": "anna", "at": datetime.now(UTC)}
    ended = {"ended_at": datetime.now(UTC), "status": "interrupted"}
    database[WORKERS].insert_many(
        [
            worker(1, **later, breaker="closed", rate=2.5, eta_s=24),
            worker(2, **later, breaker="open") | {"status": "paused", "orders": [order]},
            worker(3, silent_s=60),
            worker(4) | ended,
        ]
    )
    settings = {"API_KEYS": f"anna:{ANNA}", **NO_MODEL, "API_EXPOSE_DASHBOARD": "key"}
    with serve(tmp_path, **settings, MONGODB_URI=mongodb_uri, MONGODB_DB=db_name) as process:
        yield process


@pytest.mark.thorough
async def test_hidden_page_holds_no_connection(service: ServiceProcess) -> None:
    """A browser has six for each server, and a page that nobody reads must cost nothing."""
    async with visit(ANNA) as seen:
        page = seen.page
        async with page.expect_request("**/dashboard/events"):
            await page.goto(f"{service.url}/dashboard")
        async with page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
            await page.evaluate(
                "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )
        await page.evaluate("fetch('dashboard/dashboard.css')")  # what was requested before is known now
        assert sum(address.endswith("/events") for address in seen.addresses) == 1
        async with page.expect_request("**/dashboard/events"):
            await page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")


@pytest.mark.thorough
async def test_page_tells_that_the_service_is_away(service: ServiceProcess) -> None:
    async with visit(ANNA) as seen:
        await seen.page.goto(f"{service.url}/dashboard")
        assert await seen.page.locator("#problem").is_hidden()
        service.process.kill()
        await seen.page.get_by_text("The service does not answer; the figures are old.").wait_for()


@pytest.mark.thorough
async def test_axe_finds_no_barrier_and_nothing_scrolls_sideways(service: ServiceProcess) -> None:
    """At the width of a phone and of a screen, in light and dark."""
    async with visit(ANNA) as seen:
        page = seen.page
        await page.goto(f"{service.url}/dashboard")
        assert await page.locator("article").count() == 3
        schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
        for width, scheme in itertools.product((375, 1280), schemes):
            await page.set_viewport_size({"width": width, "height": 800})
            await page.emulate_media(color_scheme=scheme)
            assert await seen.axe() == [], (width, scheme)
            assert not await seen.is_too_wide(), width
        heights = "[...document.querySelectorAll('button')].map(one => one.offsetHeight)"
        assert min(await page.evaluate(heights)) >= 40
        assert not seen.problems


@pytest.mark.thorough
async def test_page_works_without_javascript(service: ServiceProcess, database: Data) -> None:
    """An order is a form, and a new page follows."""
    async with visit(ANNA, java_script_enabled=False) as seen:
        await seen.page.goto(f"{service.url}/dashboard")
        await seen.page.locator("#pause-w1").click()
        await seen.page.locator("#run-w1").get_by_text("Last order: pause, by anna").wait_for()
        assert seen.page.url == f"{service.url}/dashboard"
    stored = database[WORKERS].find_one({"_id": "w1"})
    assert stored is not None
    assert stored["orders"][0]["action"] == "pause"
