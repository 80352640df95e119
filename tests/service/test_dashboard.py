"""/dashboard over HTTP: access, the state of workers, orders, and what a page costs."""

from __future__ import annotations

import asyncio
import base64
import http.client
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient
from pymongo.database import Database

from config.service_settings import load_service_settings
from error_handler import ConfigurationError
from service import runs
from tests.forked_process import ForkedProcess
from tests.service.service_process import (
    NO_MODEL,
    ROOT,
    ServiceProcess,
    free_port,
    serve,
    service_environment,
    wait_until_it_answers,
)
from tests.service.test_schema import document

Data = Database[dict[str, Any]]
ANNA = "anna-key-0123456789abcd"
KEY = {"X-API-Key": ANNA}
WORKERS = "sentimental_analysis_workers"


@pytest.fixture
def service(tmp_path: Path, mongodb_uri: str, db_name: str) -> Iterator[ServiceProcess]:
    """A service with the page and one caller."""
    settings = {"API_KEYS": f"anna:{ANNA}", **NO_MODEL, "API_EXPOSE_DASHBOARD": "key"}
    with serve(tmp_path, **settings, MONGODB_URI=mongodb_uri, MONGODB_DB=db_name) as process:
        yield process


SERVER = {
    "server": "gpu-a:11434",
    "state": "left_out",
    "problem": "<i>",
    "is_ready": False,
    "in_flight": 3,
    "limit": 4,
    "answered": 1200,
    "seconds": 0.812,
}


def worker(number: int, silent_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    """Return the document of a worker, last written *silent_s* ago."""
    beat_at = datetime.now(UTC) - timedelta(seconds=silent_s)
    return {
        "_id": f"w{number}",
        "worker": f"worker-{number}",
        "host": f"host-{number}",
        "version": "1.0.0",
        "job_id": f"job_{number}",
        "status": "running",
        "counts": {"processed": 40, "expected": 100, "successful": 30, "failed": 7, "skipped": 3},
        "reasons": {"timeout": 7},
        "started_at": beat_at - timedelta(minutes=5),
        "beat_at": beat_at,
        **fields,
    }


def test_dashboard_is_off_unless_it_is_switched_on(tmp_path: Path) -> None:
    with serve(tmp_path, **NO_MODEL) as process:
        for path in ("/dashboard", "/dashboard/events", "/dashboard/dashboard.js"):
            assert (process.get(path).status, process.get(path).error) == (404, "NotFoundError")
        assert process.request("POST", "/dashboard/runs/w1/stop").status == 404


def test_dashboard_without_keys_is_not_open_to_other_machines() -> None:
    with pytest.raises(ConfigurationError, match=r"API_EXPOSE_DASHBOARD: stops workers, so set API_KEYS"):
        load_service_settings(None, expose_dashboard="key", allow_unauthenticated=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "Dashboard: off. API_EXPOSE_DASHBOARD=key switches it on (docs/dashboard.md)."),
        ({"API_EXPOSE_DASHBOARD": "key"}, "Dashboard: http://127.0.0.1:{port}/dashboard\n"),
        (
            {"API_EXPOSE_DASHBOARD": "key", "API_KEYS": f"anna:{ANNA}"},
            "/dashboard (the browser asks for a password: the",
        ),
    ],
    ids=["off", "no key", "key"],
)
def test_start_prints_the_address(tmp_path: Path, settings: dict[str, str], sentence: str) -> None:
    port, log = free_port(), tmp_path / "main.log"
    command = [str(ROOT / "main.py"), "--embedded", "--port", str(port)]
    process = ForkedProcess(command, service_environment(**settings), tmp_path, (log, log))
    try:
        wait_until_it_answers(ServiceProcess(process, port, log))
    finally:
        process.kill()
        process.wait()
    assert sentence.format(port=port) in log.read_text()


def test_dashboard_routes_are_not_in_the_openapi_document() -> None:
    """They answer people, and their HTML may change."""
    assert not [path for path in document(expose_dashboard="key")["paths"] if "dashboard" in path]


def test_every_dashboard_route_requires_a_key(service: ServiceProcess) -> None:
    requests = [("GET", "/dashboard"), ("GET", "/dashboard/events"), ("GET", "/dashboard/dashboard.css")]
    for method, path in [*requests, ("POST", "/dashboard/runs/w1/pause")]:
        for headers in ({}, {"X-API-Key": "wrong-key-0123456789"}):
            answer = service.request(method, path, None, headers)
            assert (answer.status, answer.error) == (401, "AuthenticationError"), path
    basic = base64.b64encode(f"any:{ANNA}".encode()).decode()
    page = service.get("/dashboard", {"Authorization": f"Basic {basic}"})
    assert page.status == 200
    assert b"No worker is running" in page.body
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy
    for answer in (page, service.get("/dashboard")):  # neither kept by a proxy, nor taken for another type
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert "frame-ancestors 'none'" in policy  # a page of another site cannot put its own picture over the buttons
    assert page.headers["cross-origin-resource-policy"] == "same-origin"
    assert b"<script>" not in page.body
    assert b"style=" not in page.body


def test_page_shows_workers_lost_workers_and_ended_runs(service: ServiceProcess, database: Data) -> None:
    """Values are escaped; a worker of which nothing was heard for longer than 15 s is lost."""
    ended = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
    database[WORKERS].insert_many(
        [
            worker(
                1,
                host="<b>host</b>",
                servers=[SERVER, {**SERVER, "server": "gpu-b:11434", "state": "ready", "problem": ""}],
            ),
            worker(2, silent_s=60),
            worker(3, status="completed", ended_at=ended, started_at=ended, beat_at=ended),
            {"_id": "old"},
        ]
    )
    page = service.get("/dashboard", KEY).body.decode()
    assert "&lt;b&gt;host&lt;/b&gt;" in page
    assert "<b>host" not in page
    assert page.count('class="card running"') == 2
    assert page.count('class="card lost"') == 1
    assert "No sign of life for 1 min" in page
    assert (
        '<tr><th scope="row">gpu-a:11434</th><td>left out: &lt;i&gt;</td><td>3 of 4</td><td>1,200</td><td>0.81</td></tr>'
        in page
    )
    assert '<tr><th scope="row">gpu-b:11434</th><td>ready</td>' in page
    assert 'action="dashboard/runs/w1/stop"' in page
    assert "dashboard/runs/w2/" not in page
    assert "2026-11-01 12:00:00" in page
    assert '<span class="badge completed">completed</span>' in page


@pytest.mark.thorough
def test_page_is_small_with_many_workers(service: ServiceProcess, database: Data) -> None:
    """50 KB, whatever the collection holds; the page says how many workers it leaves out."""
    database[WORKERS].insert_many([worker(number) for number in range(60)])
    ended = {"ended_at": datetime.now(UTC), "status": "completed"}
    database[WORKERS].insert_many([worker(number, **ended) for number in range(60, 99)])
    answer = service.get("/dashboard", KEY)
    assert len(answer.body) < 50_000
    assert b"40 more are not shown" in answer.body
    assert answer.body.partition(b'id="ended"')[2].count(b'<th scope="row">') == 20


def test_order_is_stored_with_the_name_of_the_key(service: ServiceProcess, database: Data) -> None:
    database[WORKERS].insert_one(worker(1))
    for action in ("pause", "resume"):
        answer = service.request("POST", f"/dashboard/runs/w1/{action}", headers=KEY)
        assert (answer.status, answer.headers["location"]) == (303, "../../../dashboard")
    stored = database[WORKERS].find_one({"_id": "w1"})
    assert stored is not None
    assert [(one["action"], one["by"]) for one in stored["orders"]] == [("pause", "anna"), ("resume", "anna")]
    assert "Last order: resume, by anna" in service.get("/dashboard", KEY).body.decode()
    assert "anna ordered worker w1 to pause" in service.log
    database[WORKERS].update_one({"_id": "w1"}, {"$set": {"ended_at": datetime.now(UTC)}})
    for path in ("/dashboard/runs/w1/stop", "/dashboard/runs/none/stop"):
        answer = service.request("POST", path, headers=KEY)
        assert (answer.status, answer.error) == (409, "WorkerEndedError")
    assert service.request("POST", "/dashboard/runs/w1/erase", headers=KEY).status == 422


def test_order_from_a_page_of_another_site_is_refused(service: ServiceProcess, database: Data) -> None:
    """The browser would add the key of Basic to it. Over plain http it sends only Origin."""
    database[WORKERS].insert_one(worker(1))
    foreign = [{"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}, {"Sec-Fetch-Site": "same-site"}]
    foreign += [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://["}]
    own = [{"Sec-Fetch-Site": "same-origin"}, {"Origin": service.url}]
    for headers in (*foreign, *own):
        answer = service.request("POST", "/dashboard/runs/w1/stop", headers={**KEY, **headers})
        assert answer.status == (303 if headers in own else 403), headers
    stored = database[WORKERS].find_one({"_id": "w1"})
    assert stored is not None
    assert len(stored["orders"]) == len(own)


@pytest.mark.parametrize("uri", ["mongodb://127.0.0.1:1", "mongodb+srv://nowhere.invalid/?connectTimeoutMS=200"])
def test_page_names_the_problem_while_mongodb_is_away(tmp_path: Path, uri: str) -> None:
    """Also if DNS does not know it. The log has the reason."""
    away = {"MONGODB_URI": uri, "MONGODB_TIMEOUT_MS": "200", "MONGODB_BACKOFF_S": "0"}
    with serve(tmp_path, **NO_MODEL, API_EXPOSE_DASHBOARD="key", **away) as process:
        page = process.get("/dashboard")
        assert (page.status, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
        assert b"MongoDB does not answer" in page.body
        assert process.request("POST", "/dashboard/runs/w1/stop").error == "StoreUnavailableError"
        while (charts := process.get("/dashboard/charts")).status == 202:
            time.sleep(0.02)
        assert charts.status == 503
        assert "(give an order to a worker)" in process.log


def test_events_send_the_new_state_and_end_when_the_service_stops(service: ServiceProcess, database: Data) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    connection.request("GET", "/dashboard/events", headers=KEY)
    stream = connection.getresponse()
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert read_event(stream).count("card running") == 0
    database[WORKERS].insert_one(worker(1))
    assert read_event(stream).count("card running") == 1
    assert service.terminate(20) == -15
    stream.read()
    connection.close()


async def test_open_pages_share_one_read_of_mongodb(
    mongodb_uri: str, database: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that nobody opens reads nothing; an order is visible at once."""
    monkeypatch.setattr(runs, "FRESH_S", 3600.0)
    database.command("profile", 2)
    async with AsyncMongoClient[dict[str, Any]](mongodb_uri) as client:
        shared = runs.Runs(client[database.name], "sentimental_analysis")
        await asyncio.gather(*(shared.view() for _ in range(50)))
        database[WORKERS].insert_one(worker(1))
        assert await shared.order("w1", "pause", "anna")
        views = await asyncio.gather(*(shared.view() for _ in range(50)))
    database.command("profile", 0)
    assert {view.active[0]["order"]["action"] for view in views} == {"pause"}
    reads = {"ns": f"{database.name}.{WORKERS}", "command.aggregate": WORKERS}
    assert database["system.profile"].count_documents(reads) == 2


def read_event(stream: http.client.HTTPResponse) -> str:
    """Return the data of the next event."""
    lines = []
    while (line := stream.readline().decode().rstrip("\n")) or not lines:
        lines.append(line)
    assert lines[0] == "event: runs"
    return "\n".join(line.removeprefix("data: ") for line in lines[1:])
