"""Pages of the service in a headless Chromium, with axe; skips where none is installed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Dialog, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 20_000


@dataclass
class Visit:
    """An open page that agrees to every question. *problems* are errors of scripts and violations of the CSP."""

    page: Page
    problems: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)  # of all requests
    questions: list[str] = field(default_factory=list)

    async def axe(self) -> list[str]:
        """Return the violations that axe finds, as ``rule: elements``."""
        found = await Axe().run(self.page)
        return [f"{one['id']}: {[node['html'] for node in one['nodes'][:3]]}" for one in found.response["violations"]]

    async def is_too_wide(self) -> bool:
        """Return whether the page scrolls sideways."""
        return bool(await self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


@asynccontextmanager
async def visit(password: str, **context: Any) -> AsyncIterator[Visit]:
    """Open a page in a browser that answers with *password* if it is asked; *context* is of ``Browser.new_context``."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = await browser.new_context(http_credentials={"username": "me", "password": password}, **context)
        page = await opened.new_page()
        page.set_default_timeout(WAIT_MS)
        seen = Visit(page)

        async def agree(dialog: Dialog) -> None:
            seen.questions.append(dialog.message)
            await dialog.accept()

        page.on("dialog", agree)
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("console", lambda said: seen.problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: seen.addresses.append(request.url))
        try:
            yield seen
        finally:
            await browser.close()
