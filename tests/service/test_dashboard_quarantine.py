"""The tab Quarantine over HTTP: what it shows and hides, replay and drop, and who did it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pymongo.database import Database

from error_handler import Reason
from storage.extended_json import canonical
from tests.commands.test_quarantine import CANARY, LABELS, failed
from tests.service.service_process import NO_MODEL, ServiceProcess, serve
from tests.worker.site import conversation
from utils.batch_file_manager import BatchFiles

Data = Database[dict[str, Any]]
ANNA = "anna-key-0123456789abcd"
KEY = {"X-API-Key": ANNA}
ORDERS = "sentimental_analysis_orders"
PAGE = "/dashboard/quarantine"

Start = Callable[..., AbstractContextManager[ServiceProcess]]


@pytest.fixture
def start(tmp_path: Path, mongodb_uri: str, db_name: str) -> Start:
    """Return a function that starts a service with the page."""
    settings = {"API_KEYS": f"anna:{ANNA}", **NO_MODEL, "API_EXPOSE_DASHBOARD": "key"}
    place = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name}
    return lambda **more: serve(tmp_path, **settings, **place, **more)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a worker's directory with three documents in quarantine, one of them with an answer."""
    files = BatchFiles(tmp_path / "batch_files")
    files.save_failed("quarantine", 1, [failed("a", 1), failed("<b>7</b>", 3, reason=Reason.EMPTY)])
    written = {"status": "write_failed", "classification_result": {"classification": LABELS}}
    files.save_failed("quarantine", 2, [failed("d", 0, reason=Reason.STORE_FAILED, **written)])
    return files.directory


@pytest.fixture
def with_files(start: Start, directory: Path) -> Iterator[ServiceProcess]:
    with start(DASHBOARD_BATCH_FILES_DIR=str(directory)) as process:
        yield process


@pytest.fixture
def with_mongodb(start: Start, database: Data) -> Iterator[ServiceProcess]:
    """A service beside a collection with two failed conversations."""
    for number, reason in ((1, "timeout"), (2, "empty"), (3, None)):
        status = {"status": "failed", "status_reason": reason} if reason else {"status": "processed"}
        database["conversation_set"].insert_one({**conversation(number, f"{CANARY} {number}"), **status})
    with start() as process:
        yield process


def page(service: ServiceProcess, path: str = "") -> str:
    answer = service.get(PAGE + path, KEY)
    assert answer.status == 200, answer.body
    return answer.body.decode()


def post(service: ServiceProcess, path: str, **headers: str) -> Any:
    return service.request("POST", PAGE + path, headers={**KEY, **headers})


def one(document_id: Any) -> str:
    return f"?id={quote(canonical(document_id))}"


def test_quarantine_of_a_worker_is_listed_escaped_and_without_text(with_files: ServiceProcess) -> None:
    shown = page(with_files)
    assert "3 in the quarantine of batch_files" in shown
    assert shown.count("quarantine/show?id=") == 3
    assert "&lt;b&gt;7&lt;/b&gt;" in shown
    assert "<b>7" not in shown
    assert page(with_files, "?reason=empty").count("quarantine/show?id=") == 1
    detail = page(with_files, f"/show{one('d')}")
    assert "store_failed" in detail
    assert "replay does not ask the model again" in detail
    assert "DASHBOARD_SHOW_TEXT=true" in detail
    assert CANARY not in shown + detail
    assert LABELS["intent"] in detail
    assert LABELS["categorization"] not in detail  # it may repeat what the customer wrote
    assert with_files.get(f"{PAGE}/show{one('nobody')}", KEY).status == 404


def test_text_is_shown_if_the_setting_allows_it(start: Start, directory: Path) -> None:
    with start(DASHBOARD_BATCH_FILES_DIR=str(directory), DASHBOARD_SHOW_TEXT="true") as service:
        assert f"{CANARY} of d" in page(service, f"/show{one('d')}")
        assert LABELS["categorization"] in page(service, f"/show{one('d')}")
        assert CANARY not in page(service)
        assert CANARY not in service.log


def test_replay_and_drop_are_carried_out_and_written_down(
    with_files: ServiceProcess, directory: Path, database: Data
) -> None:
    """The answer leads back to the list; the collection of orders and the log name the key."""
    answer = post(with_files, f"/replay{one('a')}")
    location = "../../dashboard/quarantine?did=replay&done=1&stayed=0"
    assert (answer.status, answer.headers["location"]) == (303, location)
    assert [document["_id"] for batch in BatchFiles(directory).load_pending() for document in batch.documents] == ["a"]
    assert "1 document released" in page(with_files, "?did=replay&done=1&stayed=0")
    assert post(with_files, "/drop?reason=empty").headers["location"].endswith("did=drop&done=1&stayed=0")
    assert post(with_files, "/drop?all=1").headers["location"].endswith("did=drop&done=1&stayed=0")
    orders = list(database[ORDERS].find(sort=[("_id", 1)]))
    assert [(order["by"], order["action"], order["done"]) for order in orders] == [
        ("anna", "replay", 1),
        ("anna", "drop", 1),
        ("anna", "drop", 1),
    ]
    assert [(order["ids"], order["reason"]) for order in orders] == [(['"a"'], None), (None, "empty"), (None, None)]
    assert all("at" in order for order in orders)
    assert "anna: drop failed documents (empty): 1" in with_files.log
    assert "anna, drop, empty: 1" in page(with_files)


def test_files_of_a_running_worker_are_not_changed(with_files: ServiceProcess, directory: Path, database: Data) -> None:
    """The page says what to do, and the order is written down without an outcome."""
    worker = BatchFiles(directory)
    worker.acquire()
    answer = post(with_files, "/drop?all=1")
    assert answer.status == 409
    assert b"A worker uses these files now" in answer.body
    worker.release()
    shown = page(with_files)
    assert "3 in the quarantine" in shown
    assert "not carried out" in shown
    assert "done" not in next(database[ORDERS].find())


def test_without_files_the_status_in_mongodb_is_shown_and_set_back(
    with_mongodb: ServiceProcess, database: Data
) -> None:
    shown = page(with_mongodb)
    assert "2 in MongoDB" in shown
    assert "Drop" not in shown
    detail = page(with_mongodb, f"/show{one(1)}")
    assert "timeout" in detail
    assert CANARY not in shown + detail
    assert post(with_mongodb, "/replay?reason=timeout").status == 303
    assert post(with_mongodb, f"/replay{one(3)}").headers["location"].endswith("done=0&stayed=0")
    states = {found["_id"]: found["status"] for found in database["conversation_set"].find()}
    assert states == {1: "pending", 2: "failed", 3: "processed"}
    refused = post(with_mongodb, "/drop?all=1")
    assert refused.status == 422
    assert b"DASHBOARD_BATCH_FILES_DIR" in refused.body


def test_order_names_exactly_one_selection(with_mongodb: ServiceProcess, database: Data) -> None:
    """A forgotten parameter must not mean all."""
    wrong = ("", "?id=1&reason=empty", "?all=0", "?all=1&all=1", "?other=1", "?reason=%ff", "?id=" + "x" * 9000)
    assert {query: post(with_mongodb, f"/replay{query}").status for query in wrong} == dict.fromkeys(wrong, 422)
    assert database[ORDERS].count_documents({}) == 0


def test_order_from_a_page_of_another_site_or_without_a_key_is_refused(
    with_mongodb: ServiceProcess, database: Data
) -> None:
    path = "/replay?all=1"
    assert post(with_mongodb, path, Origin="http://evil.example").error == "CrossSiteError"
    assert with_mongodb.request("POST", PAGE + path).error == "AuthenticationError"
    assert with_mongodb.get(PAGE + path, KEY).status == 405
    assert database["conversation_set"].count_documents({"status": "failed"}) == 2


def test_order_is_refused_if_it_cannot_be_written_down(start: Start, directory: Path) -> None:
    """Without MongoDB there is no entry, so nothing is dropped."""
    away = {"MONGODB_URI": "mongodb://127.0.0.1:1", "MONGODB_TIMEOUT_MS": "200", "MONGODB_BACKOFF_S": "0"}
    with serve(
        directory.parent,
        **NO_MODEL,
        API_EXPOSE_DASHBOARD="key",
        DASHBOARD_BATCH_FILES_DIR=str(directory),
        **away,
    ) as service:
        answer = service.request("POST", f"{PAGE}/drop?all=1")
        assert answer.status == 503
        assert b"MongoDB does not answer" in answer.body
    assert len(list(BatchFiles(directory).failure_files("quarantine"))) == 2


def test_directory_that_is_missing_is_named_in_the_log(start: Start, tmp_path: Path) -> None:
    with start(DASHBOARD_BATCH_FILES_DIR=str(tmp_path / "nowhere")) as service:
        answer = service.get(PAGE, KEY)
        assert answer.status == 503
        assert b"see the log of the service" in answer.body
        assert "there is no directory" in service.log
