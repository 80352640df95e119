"""A headless Chromium, driven through its DevTools protocol; skips where none is installed."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WAIT_S = 20.0
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server"),
    "--remote-debugging-port=0",
)


class Tab:
    """One page of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, password: str) -> None:
        self._socket = socket
        self._password = password
        self._number = 0
        self.problems: list[str] = []  # exceptions of scripts, and violations of the content security policy
        self.addresses: list[str] = []  # of all requests

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are noted."""
        await self._post(method, **parameters)
        number = self._number
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), WAIT_S)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            await self._note(message)

    async def _post(self, method: str, **parameters: Any) -> None:
        """Send a command without waiting for its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})

    async def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["source"] in ("security", "violation"):
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.addresses.append(parameters["request"]["url"])
        elif method == "Fetch.requestPaused":
            await self._post("Fetch.continueRequest", requestId=parameters["requestId"])
        elif method == "Fetch.authRequired":  # what a person types into the dialogue of the browser
            typed = {"response": "ProvideCredentials", "username": "me", "password": self._password}
            await self._post("Fetch.continueWithAuth", requestId=parameters["requestId"], authChallengeResponse=typed)

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript *expression*."""
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, is_right: Callable[[Any], object] = bool) -> Any:
        """Return the value of *expression* as soon as it *is_right*."""
        async with asyncio.timeout(WAIT_S):
            while not is_right(value := await self.value(expression)):
                await asyncio.sleep(0.02)
        return value

    async def press(self, key: str) -> None:
        """Press and release *key*, such as ``a`` or ``Enter``."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    async def write(self, text: str) -> None:
        """Type *text* into the focused element."""
        await self.send("Input.insertText", text=text)


@asynccontextmanager
async def open_tab(folder: Path, password: str) -> AsyncIterator[Tab]:
    """Start a browser with a profile in *folder* and yield its tab; it answers with *password* if it is asked for one."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    profile = folder / "chromium"
    profile.mkdir()
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(WAIT_S):
            while not port_file.is_file() or "\n" not in port_file.read_text():
                assert process.poll() is None, (folder / "chromium.log").read_text()
                await asyncio.sleep(0.05)
        port = port_file.read_text().split("\n")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                address = next(one for one in await answer.json() if one["type"] == "page")["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket, password)
                for domain in ("Runtime", "Log", "Network", "Page"):
                    await tab.send(f"{domain}.enable")
                await tab.send("Fetch.enable", handleAuthRequests=True)
                yield tab
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
