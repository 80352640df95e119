"""GET and POST /similar of a real service: answers, refusals, one search at a time, and what is said without an index."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import NO_MODEL, Answer, ServiceProcess, conversation, serve, service_environment

CANARY = "CANARY-4929-1234"
KEY = "helpdesk-key-0123456789"
LABELS = {"intent": "Order Status", "topic": "Shipping/Delivery", "sentiment": "Negative", "categorization": "Late."}
APP = "tests.service.similar_service:app"


def item(name: str, text: str, **metadata: str) -> dict[str, Any]:
    return {"name": name, "text": text, "metadata": {"source_id": name, **LABELS, **metadata}}


ITEMS = [
    item('{"$oid": "65f1c0ffee65f1c0ffee65f1"}', "my parcel has not come", conversation_number="17"),
    item('"doc0"', "the invoice is wrong", classified_at="2026-11-21T10:00:00+00:00", classified_by="llama3.2"),
    item('{"$numberInt": "7"}', "das Paket kam nicht \u4f60\u597d"),
]


class Site:
    """The service, and the file that its index reads."""

    def __init__(self, service: ServiceProcess, folder: Path) -> None:
        self.service, self._folder = service, folder

    def index(self, **state: Any) -> None:
        write_index(self._folder, **state)

    @property
    def events(self) -> list[str]:
        path = self._folder / "searches.log"
        return path.read_text(encoding="utf-8").split() if path.exists() else []

    def get(self, text: str, **parameters: Any) -> Answer:
        return self.service.get(f"/similar?{urlencode({'text': text, **parameters})}")

    def post(self, body: Any) -> Answer:
        return self.service.request("POST", "/similar", body)


def write_index(folder: Path, **state: Any) -> None:
    beside = folder / "index.json.new"
    beside.write_text(json.dumps({"items": ITEMS, **state}), encoding="utf-8")
    beside.replace(folder / "index.json")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("similar")
    write_index(folder)
    with serve(folder, app=APP, **NO_MODEL, LOG_LEVEL="DEBUG", API_MAX_BODY_BYTES="60000") as service:
        yield Site(service, folder)


@pytest.fixture
def model(fake: FakeOllama) -> dict[str, str]:
    """The settings of the model server."""
    return {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2"}


@pytest.fixture
def site(shared: Site) -> Site:
    shared.index()
    return shared


def test_search_returns_similar_conversations_with_their_labels(site: Site) -> None:
    """In the order of similarity; what a conversation does not have is null; both methods say the same."""
    answer = site.get("where is my parcel", limit=2)
    assert answer.status == 200
    assert list(answer.json) == ["model", "hits"]
    assert answer.json["model"] == "words-1"
    first, second = answer.json["hits"]
    assert first == {
        "source_id": ITEMS[0]["name"],
        "conversation_number": "17",
        "similarity": 0.4472,
        "classification": LABELS,
        "classified_at": None,
        "classified_by": None,
    }
    assert (second["source_id"], second["conversation_number"]) == ('"doc0"', None)
    assert (second["classified_at"], second["classified_by"]) == ("2026-11-21T10:00:00+00:00", "llama3.2")
    assert first["similarity"] >= second["similarity"]
    assert site.post({"text": "where is my parcel", "limit": 2}).body == answer.body
    assert len(site.post({"text": "where is my parcel"}).json["hits"]) == 3
    assert len(site.post({"text": "where is my parcel", "limit": 2.0}).json["hits"]) == 2
    assert site.get("\u4f60\u597d").json["hits"][0]["source_id"] == ITEMS[2]["name"]
    assert site.service.get("/similar?text=" + quote("du Paket") + "&limit=1").json["hits"][0]["similarity"] > 0
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.thorough
def test_index_is_opened_once_at_the_first_search(tmp_path: Path, model: dict[str, str]) -> None:
    """Not at the start, and what is indexed afterwards is found."""
    write_index(tmp_path)
    with serve(tmp_path, app=APP, **model) as service:
        site = Site(service, tmp_path)
        assert service.classify().status == 200
        assert site.events == []
        assert site.get("parcel").status == 200
        site.index(items=[item('"new"', "parcel")])
        assert site.get("parcel").json["hits"][0]["source_id"] == '"new"'
        assert site.events.count("open") == 1
        assert service.terminate(10) in (0, -15)
        assert site.events[-1] == "close"


INVALID: list[tuple[str, str, str]] = [
    ("no text", "", "text"),
    ("empty text", "text=", "text"),
    ("text without a value", "text", "text"),
    ("invisible text", "text=%E2%80%8B%00", "text"),
    ("text twice", f"text={CANARY}&text=b", "twice"),
    ("limit no number", f"text={CANARY}&limit={CANARY}", "limit"),
    ("limit zero", f"text={CANARY}&limit=0", "limit"),
    ("limit too high", f"text={CANARY}&limit=51", "limit"),
    ("limit negative", f"text={CANARY}&limit=-1", "limit"),
    ("limit a fraction", f"text={CANARY}&limit=1.5", "limit"),
    ("limit in other digits", f"text={CANARY}&limit=%D9%A3", "limit"),
    ("unknown parameter", f"text={CANARY}&{CANARY}=1", "unknown field"),
    ("not UTF-8", f"text={CANARY}%FF", "UTF-8"),
    ("half of a pair", f"text={CANARY}%ED%A0%80", "UTF-8"),
    ("too long", "text=" + CANARY * 130, "POST /similar"),
    ("very many parameters", "&".join(f"a{n}={CANARY}" for n in range(300)), "encode"),
]


@pytest.mark.parametrize(("query", "place"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_invalid_query_gets_422_that_names_the_parameter_without_its_content(
    site: Site, query: str, place: str
) -> None:
    """422, nothing of it in answer or log, and nothing is searched."""
    searched = len(site.events)
    answer = site.service.get(f"/similar?{query}")
    assert (answer.status, answer.error) == (422, "ValidationError")
    assert place in answer.json["error"]["message"]
    assert "CANARY" not in answer.body.decode() + site.service.log
    assert len(site.events) == searched


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "text"),
        ({"text": [CANARY]}, "text"),
        ({"text": CANARY, "limit": "5"}, "limit"),
        ({"text": CANARY, "limit": True}, "limit"),
        ({"text": CANARY, "limit": 1.5}, "limit"),
        ({"text": CANARY, "limit": 1e300}, "limit"),
        ({"text": CANARY, "limit": 51}, "limit"),
        ({"text": CANARY, CANARY: 1}, "unknown field"),
        ({"text": CANARY * 700}, "10000"),
        ({"text": " \u200b\n"}, "visible"),
    ],
    ids=str,
)
def test_invalid_body_gets_422_that_names_the_field_without_its_content(site: Site, body: Any, place: str) -> None:
    """422."""
    answer = site.post(body)
    assert (answer.status, answer.error) == (422, "ValidationError")
    assert place in answer.json["error"]["message"]
    assert "CANARY" not in answer.body.decode() + site.service.log


def test_search_is_as_strict_about_bodies_and_methods_as_classify(site: Site) -> None:
    """JSON, once, within the size, and by GET or POST."""
    for body, status, kind in ((b"CANARY", 400, "InvalidJSONError"), (b"[]", 400, "InvalidJSONError")):
        answer = site.service.request("POST", "/similar", body, {"Content-Type": "application/json"})
        assert (answer.status, answer.error) == (status, kind)
    assert site.service.request("POST", "/similar", b"{}", {"Content-Type": "text/plain"}).status == 415
    assert site.post({"text": "a" * 70_000}).status == 413
    refused = site.service.request("DELETE", "/similar")
    assert (refused.status, refused.error) == (405, "MethodNotAllowedError")
    assert "CANARY" not in site.service.log


def test_search_text_never_appears_in_logs_or_metrics(site: Site) -> None:
    """One line with route, status and duration for each search; uvicorn's own would hold the query."""
    answer = site.service.get(f"/similar?text={CANARY}", {"X-Request-ID": "search-1"})
    assert answer.status == 200
    assert answer.headers["x-request-id"] == "search-1"
    site.service.wait_for_log("/similar 200 in ")
    site.service.wait_for_log("request_id=search-1")
    assert "CANARY" not in site.service.log + site.service.get("/metrics").body.decode()


def test_metrics_count_each_search(site: Site) -> None:
    """Route, status and time."""
    names = ('triad_http_requests_total{route="/similar",status="200"}', "triad_search_duration_seconds_count")
    before = [site.service.metric(name) for name in names]
    assert site.get("parcel").status == 200
    assert [site.service.metric(name) for name in names] == [number + 1 for number in before]
    assert site.service.metric("triad_search_queue_length") == 0


SEARCH_FAULTS = [
    ("away", 503, "EmbeddingUnavailableError", "5"),
    ("busy", 503, "EmbeddingUnavailableError", "7"),
    ("refuses", 422, "ValidationError", None),
    ("unusable", 502, "ModelAnswerError", None),
    ("damaged", 503, "IndexUnusableError", None),
]


@pytest.mark.parametrize(("fault", "status", "kind", "retry_after"), SEARCH_FAULTS, ids=[f[0] for f in SEARCH_FAULTS])
def test_search_failure_maps_to_status(site: Site, fault: str, status: int, kind: str, retry_after: str | None) -> None:
    """And the next one works."""
    site.index(search=fault)
    answer = site.get(CANARY)
    assert (answer.status, answer.error) == (status, kind)
    assert answer.headers.get("retry-after") == retry_after
    site.index()
    assert site.get("parcel").status == 200
    assert "CANARY" not in answer.body.decode() + site.service.log


@pytest.mark.parametrize("fault", ["other model", pytest.param("wrong key", marks=pytest.mark.thorough)])
def test_index_with_outdated_settings_is_reopened(site: Site, fault: str) -> None:
    """By the settings that there are then; until it is, nobody waits for the same failure again."""
    assert site.get("parcel").status == 200
    opened, begun = site.events.count("open"), site.events.count("begin")
    site.index(search=fault)
    assert site.get("parcel").error == "IndexUnusableError"
    assert site.events[-1] == "close"
    site.index()
    assert site.get("parcel").error == "IndexUnusableError"
    assert site.events.count("begin") == begun + 1
    end = time.monotonic() + 20
    while site.get("parcel").status != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert site.events.count("open") == opened + 1


@pytest.mark.parametrize(
    ("state", "kind", "remedy"),
    mostly_thorough(
        [
            ({"opening": "not installed"}, "IndexNotInstalledError", "requirements-index.txt"),
            ({"opening": "wrong key"}, "IndexUnusableError", "OPENAI_API_KEY is wrong."),
            ({"opening": "other model"}, "IndexUnusableError", "rebuild it"),
            ({"items": []}, "IndexEmptyError", "cli.py index"),
            ({"is_external": True}, "ExternalProviderError", "ALLOW_EXTERNAL_LLM"),
        ],
        4,
    ),
    ids=str,
)
def test_service_without_usable_index_returns_503_and_still_classifies(
    tmp_path: Path, model: dict[str, str], state: dict[str, Any], kind: str, remedy: str
) -> None:
    """503, in the answer or the log; no search if the text would leave the network."""
    write_index(tmp_path, **state)
    with serve(tmp_path, app=APP, **model, ALLOW_EXTERNAL_LLM="") as service:
        site = Site(service, tmp_path)
        for answer in (site.get(CANARY), site.post({"text": CANARY})):
            assert (answer.status, answer.error) == (503, kind)
            assert remedy in answer.body.decode() + service.log
        assert service.classify(conversation()).status == 200
        assert ("begin" in site.events) == (kind == "IndexEmptyError")
        assert "CANARY" not in service.log


def test_external_provider_is_used_with_permission(tmp_path: Path) -> None:
    """ALLOW_EXTERNAL_LLM, as for document jobs."""
    write_index(tmp_path, is_external=True)
    with serve(tmp_path, app=APP, ALLOW_EXTERNAL_LLM="true", **NO_MODEL) as service:
        assert Site(service, tmp_path).get("parcel").status == 200


def test_service_classifies_without_the_index_packages(tmp_path: Path) -> None:
    """They are optional; the very application of main.py."""
    with serve(tmp_path, app="tests.service.service_without_index:app", API_EMBEDDED="true") as service:
        assert service.classify().status == 200
        answer = service.get("/similar?text=parcel")
        assert (answer.status, answer.error) == (503, "IndexNotInstalledError")


@pytest.mark.thorough
def test_main_does_not_import_the_index_packages(tmp_path: Path) -> None:
    """They take a second and a hundred MiB, and most services never search."""
    program = "import sys, main; print(sorted({'numpy', 'chromadb', 'sqlalchemy', 'tokenizers', 'openai'} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=service_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.strip() == "[]", ended.stderr


def test_keys_and_rate_limits_apply_to_searches(tmp_path: Path, model: dict[str, str]) -> None:
    """One rate for both routes."""
    write_index(tmp_path)
    keys = {"API_KEYS": f"helpdesk:{KEY}", "API_RATE_LIMIT_PER_MINUTE": "3"}
    with serve(tmp_path, app=APP, **model, **keys) as service:
        assert service.get("/similar?text=a").error == "AuthenticationError"
        assert service.request("POST", "/similar", {"text": "a"}).error == "AuthenticationError"
        with_key = {"X-API-Key": KEY}
        assert service.get("/similar?text=parcel", with_key).status == 200
        assert service.request("POST", "/similar", {"text": "parcel"}, with_key).status == 200
        assert service.classify(X_API_Key=KEY).status == 200
        assert service.get("/similar?text=parcel", with_key).error == "RateLimitError"
        assert "helpdesk" in service.log


def test_searches_run_one_at_a_time_with_a_bounded_queue(tmp_path: Path) -> None:
    """Two at once would take both cores from /classify; a caller that finds the queue full gets an error at once."""
    write_index(tmp_path, search_s=0.1)
    with serve(tmp_path, app=APP, API_QUEUE_SIZE="3", **NO_MODEL) as service:
        site = Site(service, tmp_path)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(site.get, ["parcel"] * 12))
        statuses = [answer.status for answer in answers]
        assert set(statuses) == {200, 503}
        assert {answer.error for answer in answers if answer.status == 503} == {"QueueFullError"}
        events = [event for event in site.events if event in ("begin", "end")]
        assert events == ["begin", "end"] * statuses.count(200)


@pytest.mark.slow
def test_search_ends_at_the_request_deadline(tmp_path: Path) -> None:
    """504; the thread ends what it has begun, and the next search is answered."""
    write_index(tmp_path, search_s=1.5)
    with serve(tmp_path, app=APP, API_REQUEST_TIMEOUT_S="1", **NO_MODEL) as service:
        site = Site(service, tmp_path)
        late = site.get("parcel")
        assert (late.status, late.error) == (504, "DeadlineError")
        site.index()
        assert site.get("parcel").status == 200
        assert site.events.count("begin") == site.events.count("end") == 2


@pytest.mark.thorough
def test_disconnected_search_frees_its_slot(tmp_path: Path) -> None:
    """Counted as 499; a search that had not begun is not made."""
    write_index(tmp_path, search_s=0.5)
    with serve(tmp_path, app=APP, **NO_MODEL) as service:
        site = Site(service, tmp_path)
        head = b"GET /similar?text=parcel HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for sock in [service.connect(head) for _ in range(4)]:
            sock.close()
        service.wait_for_metric('triad_http_requests_total{route="/similar",status="499"}', 4)
        assert site.get("parcel").status == 200
        assert site.events.count("begin") < 5
