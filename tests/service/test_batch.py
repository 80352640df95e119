"""POST /classify/batch and GET /labels: results and errors for each conversation, limits, the taxonomy."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from config import load_taxonomy
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import WITH_PHRASES, ServiceProcess, conversation, serve

LIMITS = {"API_MAX_TEXT_CHARACTERS": "2000", "API_MAX_BODY_BYTES": "10000", "API_MAX_BATCH_BYTES": "100000"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, fake: FakeOllama) -> Iterator[ServiceProcess]:
    """Return a service with two slots, and a queue for one more request."""
    bounds = {"API_MAX_CONCURRENT": "2", "API_QUEUE_SIZE": "1", **LIMITS}
    folder = tmp_path_factory.mktemp("batch")
    with serve(folder, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **bounds) as process:
        yield process


def item(number: int, **more: Any) -> dict[str, Any]:
    return {**conversation(f"Where is parcel {number}?", str(number)), **more}


def post(service: ServiceProcess, *items: Any, **headers: str) -> Any:
    return service.request("POST", "/classify/batch", {"conversations": list(items)}, headers)


def test_each_conversation_has_a_result_in_the_order_of_the_request(service: ServiceProcess) -> None:
    """Labels, or the error of POST /classify; the status of the whole is 200."""
    silent = {"conversation_number": "2", "id": "b", "messages": [{"sender": "agent", "text": "Hello?"}]}
    answer = post(
        service, item(1, id="a"), silent, item(3), item(4, id="d", messages=conversation("x" * 2001)["messages"])
    )
    assert answer.status == 200
    body = answer.json
    assert (body["succeeded"], body["failed"]) == (2, 2)
    first, second, third, fourth = body["results"]
    assert first["classification"] == service.classify(item(1)).json["classification"]
    assert (first["id"], first["conversation_number"], first["status"], first["model"]) == ("a", "1", 200, "llama3.2")
    assert (second["id"], second["status"], second["error"]["type"]) == ("b", 422, "ValidationError")
    assert "id" not in third
    assert third["status"] == 200
    assert (fourth["status"], "2000" in fourth["error"]["message"]) == (422, True)
    service.wait_for_log("/classify/batch 200")
    assert "2 of 4 conversations labelled" in service.log
    assert "parcel" not in service.log


def test_batch_waits_for_room_instead_of_failing_when_the_queue_is_full(
    service: ServiceProcess, fake: FakeOllama
) -> None:
    """Three batches, two slots and one place in the queue: each that is admitted is admitted as a whole."""
    asked = fake.stats()["answered"]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: post(service, *(item(n) for n in range(60))), range(3)))
    admitted = [answer.json for answer in answers if answer.status == 200]
    assert len(admitted) >= 2
    assert {answer.error for answer in answers if answer.status != 200} <= {"QueueFullError"}
    for answer in admitted:
        assert answer["succeeded"] == 60
        assert [result["conversation_number"] for result in answer["results"]] == [str(n) for n in range(60)]
    assert fake.stats()["answered"] == asked + 60 * len(admitted)
    assert service.metric("triad_model_calls_in_flight") == 0


@pytest.mark.parametrize(
    ("items", "status", "kind", "place"),
    [
        ([], 422, "ValidationError", "conversations"),
        ([item(n) for n in range(101)], 422, "ValidationError", "conversations"),
        ([item(1, id="a"), item(2, id="a")], 409, "DuplicateIdError", "id"),
        ([item(1), item(2, priority="high")], 422, "ValidationError", "conversations[1]: unknown field priority"),
        ([item(1, id="")], 422, "ValidationError", "conversations[0].id"),
        (
            [item(1, messages=[{"sender": "customer", "text": "a", "channel": "mail"}])],
            422,
            "ValidationError",
            "channel",
        ),
        ([item(1, messages=conversation("x" * 110_000)["messages"])], 413, "PayloadTooLargeError", ""),
    ],
    ids=["none", "too many", "id twice", "unknown field", "empty id", "unknown field inside", "too large"],
)
def test_malformed_batch_is_refused_as_a_whole(
    service: ServiceProcess, fake: FakeOllama, items: list[Any], status: int, kind: str, place: str
) -> None:
    """The error names the place, and an unknown field by its name; the model is not asked."""
    asked = fake.stats()["chat_requests"]
    answer = post(service, *items)
    assert (answer.status, answer.error) == (status, kind)
    assert place in answer.json["error"]["message"]
    assert fake.stats()["chat_requests"] == asked


def test_deadline_holds_for_the_whole_batch_and_keeps_what_is_done(tmp_path: Path) -> None:
    """What is not done by then has the error of a deadline; no call goes on."""
    with FakeOllama(slots=1, latency_s=0.3, user_message=0) as slow:
        settings = {"API_MAX_CONCURRENT": "1", "API_REQUEST_TIMEOUT_S": "0.5"}
        with serve(tmp_path, OLLAMA_ENDPOINT=slow.url, OLLAMA_MODEL="llama3.2", **settings) as service:
            results = post(service, *(item(n) for n in range(4))).json["results"]
            assert [result["status"] for result in results] == [200, 504, 504, 504]
            assert results[1]["error"]["type"] == "DeadlineError"
            service.wait_for_metric("triad_model_calls_in_flight", 0)
            assert slow.stats()["chat_requests"] <= 3  # one of them warms the model up


def test_batch_counts_as_its_conversations_for_the_rate_limit_and_needs_a_key(tmp_path: Path) -> None:
    """A batch is admitted with one request left, and what follows waits for the rest."""
    keys = {"API_KEYS": "a:0123456789abcdef,b:fedcba9876543210", "API_RATE_LIMIT_PER_MINUTE": "10"}
    with serve(tmp_path, app=WITH_PHRASES, API_EMBEDDED="true", **keys) as service:
        key = {"X-API-Key": "0123456789abcdef"}
        assert post(service, item(1)).error == "AuthenticationError"
        assert post(service, *(item(n) for n in range(30)), **key).json["succeeded"] == 30
        refused = post(service, item(1), **key)
        assert (refused.status, refused.error) == (429, "RateLimitError")
        assert int(refused.headers["retry-after"]) > 100
        assert service.get("/labels").error == "AuthenticationError"
        assert service.get("/labels", key).status == 200
        assert post(service, item(1), **{"X-API-Key": "fedcba9876543210"}).status == 200


def test_labels_are_the_taxonomy_and_have_an_etag(service: ServiceProcess) -> None:
    """304 while nothing has changed; it may be kept, unlike answers with conversations."""
    answer = service.get("/labels")
    taxonomy = load_taxonomy()
    fields = answer.json["fields"]
    assert [field["name"] for field in fields] == list(taxonomy.field_names)
    assert [label["name"] for label in fields[0]["labels"]] == list(taxonomy.names("intent"))
    assert fields[0]["labels"][0]["definition"] == taxonomy.labels("intent")[0].definition
    assert fields[0]["definition"] == "what the customer wants"
    assert (fields[0]["multiple"], answer.json["categorization"]) == (False, True)
    assert answer.headers["cache-control"] == "no-cache"
    etag = answer.headers["etag"]
    again = service.get("/labels", {"If-None-Match": f'"other", W/{etag}'})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    assert service.get("/labels", {"If-None-Match": '"other"'}).status == 200
