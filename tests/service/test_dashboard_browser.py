"""The tabs Review, Labels and Quarantine of /dashboard in a real browser: keyboard, a phone, axe, and no script from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from tests.commands.test_quarantine import failed
from tests.review.review_site import fill, result
from tests.service.chromium import Visit, visit
from tests.service.service_process import NO_MODEL, ServiceProcess, serve
from utils.batch_file_manager import BatchFiles

Data = Database[dict[str, Any]]
ANNA = "anna-key-0123456789abcd"
PHONE = {"viewport": {"width": 375, "height": 700}, "has_touch": True}


@pytest.fixture
def service(tmp_path: Path, mongodb_uri: str, db_name: str, database: Data) -> Iterator[ServiceProcess]:
    """A service with all tabs, two results to review, and three documents in quarantine."""
    files = BatchFiles(tmp_path / "batch_files")
    files.save_failed("quarantine", 1, [failed("a", 1), failed("b", 3), failed("<script>alert(1)</script>", 4)])
    fill(database, [result(1, 0.2), result(2, 0.9)])
    settings = {"API_KEYS": f"anna:{ANNA}", **NO_MODEL, "REVIEW_CONTROL_SHARE": "0"}
    pages = {"API_EXPOSE_DASHBOARD": "key", "API_EXPOSE_REVIEW": "key"}
    place = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name, "DASHBOARD_BATCH_FILES_DIR": str(files.directory)}
    with serve(tmp_path, **settings, **pages, **place) as process:
        yield process


def check(seen: Visit, service: ServiceProcess) -> None:
    """No script failed, nothing broke the policy, and nothing was requested from elsewhere."""
    assert not seen.problems
    assert {re.sub(r"^(https?://[^/]+|data:).*", r"\1", one) for one in seen.addresses} <= {service.url, "data:"}


@pytest.mark.thorough
async def test_review_works_inside_the_frame_by_keyboard(service: ServiceProcess, database: Data) -> None:
    """The old address leads to the tab. Keys decide, and Enter on a link of the frame follows the link."""
    async with visit(ANNA) as seen:
        page = seen.page
        await page.goto(f"{service.url}/review")
        assert page.url == f"{service.url}/dashboard/review"
        await page.get_by_text("Conversation 1 (anna").wait_for()
        assert not await seen.axe()
        await page.keyboard.press("Enter")
        await page.get_by_text("Conversation 2 (anna").wait_for()
        assert database["sentimental_analysis_corrections"].count_documents({"reviewer": "anna"}) == 3
        await page.get_by_role("link", name="Quarantine").focus()
        await page.keyboard.press("Enter")
        await page.get_by_role("heading", name="Failed documents").wait_for()
        assert database["sentimental_analysis_corrections"].count_documents({}) == 3
        check(seen, service)


@pytest.mark.thorough
async def test_charts_are_shown_without_a_script(service: ServiceProcess) -> None:
    async with visit(ANNA, java_script_enabled=False) as seen:
        await seen.page.goto(f"{service.url}/dashboard/labels")
        await seen.page.get_by_text("2 results, counted").wait_for()
        assert await seen.page.get_by_role("img").count() >= 4


@pytest.mark.thorough
async def test_tabs_fit_a_phone_and_the_dark(service: ServiceProcess) -> None:
    """No sideways scrolling at 375 pixels, and enough contrast in the dark."""
    tabs = {"labels": "2 results, counted", "review": "Conversation 1 (", "quarantine": "Failed documents"}
    async with visit(ANNA, color_scheme="dark", **PHONE) as seen:
        for tab, text in tabs.items():
            await seen.page.goto(f"{service.url}/dashboard/{tab}")
            await seen.page.get_by_text(text).first.wait_for()
            assert not await seen.is_too_wide()
            assert not await seen.axe()
        check(seen, service)
