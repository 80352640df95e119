"""Jobs over HTTP with real processes: results, kill -9, two services, limits, and the life of the text in MongoDB."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import WITH_PHRASES, Answer, ServiceProcess, conversation, serve

Data = Database[dict[str, Any]]
HEADS, ITEMS = "sentimental_analysis_jobs", "sentimental_analysis_job_items"
KEYS = {"API_KEYS": "a:0123456789abcdef,b:fedcba9876543210"}
A, B = {"X-API-Key": "0123456789abcdef"}, {"X-API-Key": "fedcba9876543210"}


def item(number: int, **more: Any) -> dict[str, Any]:
    return {**conversation(f"Where is parcel {number}?", str(number)), **more}


def post(service: ServiceProcess, *items: Any, headers: dict[str, str] | None = None, **more: Any) -> Answer:
    return service.request("POST", "/jobs", {"conversations": list(items), **more}, headers)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Return as soon as *condition* holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def done(service: ServiceProcess, path: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the job at *path*, with all results, when it is done."""
    page: dict[str, Any] = {}

    def is_done() -> bool:
        page.update(service.get(f"{path}?limit=1000", headers).json)
        return page["status"] == "done"

    until(is_done)
    return page


@pytest.fixture
def site(mongodb_uri: str, db_name: str, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that starts a service on the database of the test."""

    @contextmanager
    def start(fake: FakeOllama, **settings: str) -> Iterator[ServiceProcess]:
        address = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name, "OLLAMA_ENDPOINT": fake.url}
        with serve(tmp_path, OLLAMA_MODEL="llama3.2", **address, **settings) as service:
            yield service

    return start


def test_job_is_durable_then_labelled_and_its_text_is_removed(
    site: Callable[..., Any], fake: FakeOllama, database: Data
) -> None:
    """202 with its address; results page by page in the order of the request; one error does not touch the others."""
    silent = {"conversation_number": "silent", "id": "s", "messages": [{"sender": "agent", "text": "parcel?"}]}
    with site(fake) as service:
        accepted = post(service, *(item(n, id=f"i{n}") for n in range(5)), silent)
        assert (accepted.status, accepted.json["status"], accepted.json["total"]) == (202, "open", 6)
        path = accepted.headers["location"]
        assert path == f"/jobs/{accepted.json['job']}"
        page = done(service, path)
        assert (page["succeeded"], page["failed"]) == (5, 1)
        assert [result.get("id") for result in page["results"]] == ["i0", "i1", "i2", "i3", "i4", "s"]
        assert page["results"][0]["classification"] == service.classify(item(0)).json["classification"]
        assert (page["results"][5]["status"], page["results"][5]["error"]["type"]) == (422, "ValidationError")
        first = service.get(f"{path}?limit=4").json
        assert (len(first["results"]), first["next_offset"]) == (4, 4)
        second = service.get(f"{path}?limit=4&offset=4").json
        assert ([result["id"] for result in second["results"]], "next_offset" in second) == (["i4", "s"], False)
        assert service.metric('triad_job_conversations_total{outcome="succeeded"}') == 5
        assert service.metric('triad_job_conversations_total{outcome="failed"}') == 1
        assert "parcel" not in service.log
        database[ITEMS].delete_one({})  # the expiry has begun; what is gone has not failed
        assert service.get(path).error == "JobNotFoundError"
    assert "parcel" not in str(list(database[ITEMS].find()))
    head = database[HEADS].find_one() or {}
    assert (head["expires_at"] - head["created_at"]).days == 7
    for name in (HEADS, ITEMS):
        expiry = [index for index in database[name].index_information().values() if "expireAfterSeconds" in index]
        assert [index["key"] for index in expiry] == [[("expires_at", 1)]]
        assert database[name].count_documents({"expires_at": head["expires_at"]}) == database[name].count_documents({})


@pytest.mark.slow
def test_kill_in_the_middle_of_a_job_loses_nothing_and_labels_nothing_twice(
    site: Callable[..., Any], database: Data
) -> None:
    """kill -9, then another process: each conversation has exactly one result; only calls in flight are repeated."""
    in_flight = {"state": "open", "owner": {"$type": "string"}}
    later = [{"kind": "hang", "when": {"from": 10, "to": 1000}}]
    with FakeOllama(slots=4, latency_s=0, user_message=0, faults=later) as fake:
        with site(fake) as service:
            path = post(service, *(item(n) for n in range(20))).headers["location"]
            until(lambda: database[ITEMS].count_documents({"state": "done"}) >= 8)
            until(lambda: database[ITEMS].count_documents(in_flight) >= 1)
            service.process.kill()
            service.process.wait()
        before = {one["_id"]: one["result"] for one in database[ITEMS].find({"state": "done"})}
        assert 8 <= len(before) <= 10
        held = database[ITEMS].count_documents(in_flight)
        assert 1 <= held <= 4
        fake.configure(faults=[])
        with site(fake) as service:
            until(lambda: database[ITEMS].count_documents({"state": "open"}) == held)
            assert service.get(path).json["status"] == "open"  # what the dead process holds, until its leases expire
            database[ITEMS].update_many({"state": "open"}, {"$set": {"free_at": datetime.now(UTC)}})
            page = done(service, path)
        assert [result["conversation_number"] for result in page["results"]] == [str(n) for n in range(20)]
        assert page["succeeded"] == 20
        after = {one["_id"]: one["result"] for one in database[ITEMS].find()}
        assert len(after) == 20
        assert {name: after[name] for name in before} == before
        assert fake.stats()["chat_requests"] <= 20 + held + 2  # each process warms the model up


@pytest.mark.thorough
def test_two_services_share_a_job_without_labelling_twice(
    site: Callable[..., Any], fake: FakeOllama, database: Data
) -> None:
    """A claim is one atomic step."""
    with site(fake) as first, site(fake) as second:
        answered = fake.stats()["answered"]
        path = post(first, *(item(n) for n in range(60))).headers["location"]
        post(second, item(1000))
        page = done(second, path)
        assert page["succeeded"] == 60
        until(lambda: database[HEADS].count_documents({"state": "open"}) == 0)
        assert fake.stats()["answered"] == answered + 61
        shares = [one.metric('triad_job_conversations_total{outcome="succeeded"}') for one in (first, second)]
        assert sum(shares) == 61
        assert min(shares) > 0


def test_answer_of_a_service_that_was_too_slow_does_not_replace_the_result(
    site: Callable[..., Any], database: Data
) -> None:
    """Its lease expired and another process has the conversation: the later answer of the first is dropped."""
    with FakeOllama(slots=4, latency_s=0.5, user_message=0) as slow, site(slow) as service:
        path = post(service, item(1)).headers["location"]
        until(lambda: database[ITEMS].count_documents({"owner": {"$type": "string"}}) == 1)
        database[ITEMS].update_one({}, {"$set": {"owner": "another process", "free_at": datetime(2100, 1, 1)}})
        service.wait_for_metric("triad_model_calls_in_flight", 0)
        assert service.get(path).json["results"] == [{"conversation_number": "1", "status": 202}]
        assert service.metric('triad_job_conversations_total{outcome="succeeded"}') == 0


def test_conversation_that_ends_the_process_each_time_fails_in_the_end(
    site: Callable[..., Any], fake: FakeOllama, database: Data
) -> None:
    """After three attempts without an end, it is not asked again, and the job is done.

    So is one that another version of the service has stored, in a form that this one does not read.
    """
    with FakeOllama(slots=4, latency_s=60, user_message=0) as hanging, site(hanging) as service:
        path = post(service, item(1), item(2, id="two")).headers["location"]
        until(lambda: database[ITEMS].count_documents({"attempts": 1}) >= 1)
        service.process.kill()
        service.process.wait()
    now = datetime.now(UTC)
    database[ITEMS].update_one({"position": 0}, {"$set": {"attempts": 3, "free_at": now}})
    database[ITEMS].update_one({"position": 1}, {"$set": {"request.language": "en", "free_at": now}})
    with site(fake) as service:
        results = done(service, path)["results"]
    assert [(one["status"], one["error"]["type"]) for one in results] == [
        (500, "InternalError"),
        (422, "ValidationError"),
    ]
    assert (results[1]["id"], results[1]["conversation_number"]) == ("two", "2")


def test_stopped_service_gives_back_what_it_holds(site: Callable[..., Any], fake: FakeOllama, database: Data) -> None:
    """The next one starts at once, and the attempt does not count."""
    with FakeOllama(slots=4, latency_s=60, user_message=0) as hanging, site(hanging) as service:
        path = post(service, item(1)).headers["location"]
        until(lambda: database[ITEMS].count_documents({"attempts": 1}) == 1)
        service.terminate(20)
    assert database[ITEMS].count_documents({"attempts": 0, "owner": None, "state": "open"}) == 1
    with site(fake) as service:
        assert done(service, path)["succeeded"] == 1


def test_outage_of_the_model_server_fails_no_conversation(site: Callable[..., Any], database: Data) -> None:
    """503 is not an attempt; the conversation waits."""
    busy = [{"kind": "busy_503", "when": {"text": "parcel"}}]
    with FakeOllama(slots=4, user_message=0, faults=busy) as fake, site(fake) as service:
        path = post(service, item(1)).headers["location"]
        until(
            lambda: database[ITEMS].count_documents({"owner": None, "attempts": 0, "free_at": {"$type": "date"}}) == 1
        )
        until(lambda: fake.stats()["chat_requests"] >= 2)
        page = service.get(path).json
        assert (page["status"], page["failed"], page["results"][0]["status"]) == ("open", 0, 202)


def test_idempotency_key_makes_one_job(site: Callable[..., Any], fake: FakeOllama, database: Data) -> None:
    """Also after a restart and at once; another body is refused, another caller has a job of its own."""
    keyed = {**A, "Idempotency-Key": "k-1"}
    with site(fake, **KEYS) as service:
        first = post(service, item(1), headers=keyed)
        again = post(service, item(1), headers=keyed)
        assert (again.status, again.json["job"]) == (202, first.json["job"])
        assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")
        other_body = post(service, item(2), headers=keyed)
        assert (other_body.status, other_body.error) == (422, "IdempotencyError")
        assert post(service, item(1), headers={**B, "Idempotency-Key": "k-1"}).json["job"] != first.json["job"]
        malformed = post(service, item(1), headers={**A, "Idempotency-Key": "x" * 256})
        assert malformed.error == "HeaderError"
    with site(fake, **KEYS) as service:
        assert post(service, item(1), headers=keyed).json["job"] == first.json["job"]
    assert database[HEADS].count_documents({}) == 2
    assert database[ITEMS].count_documents({}) == 2


def test_job_belongs_to_its_caller_and_can_be_removed(
    site: Callable[..., Any], fake: FakeOllama, database: Data
) -> None:
    """Others get 404; afterwards nothing of it is left, and a call in flight stores nothing."""
    with FakeOllama(slots=4, latency_s=0.5, user_message=0) as slow, site(slow, **KEYS) as service:
        path = post(service, *(item(n) for n in range(3)), headers=A).headers["location"]
        assert service.get(path).error == "AuthenticationError"
        assert service.get(path, A).json["total"] == 3
        assert service.get(path, B).error == "JobNotFoundError"
        assert service.request("DELETE", path, headers=B).status == 404
        until(lambda: database[ITEMS].count_documents({"owner": {"$type": "string"}}) == 3)
        assert service.request("DELETE", path, headers=A).status == 204
        assert service.request("DELETE", path, headers=A).error == "JobNotFoundError"
        wait = {"X-API-Key": "0123456789abcdef"}
        until(lambda: b"triad_model_calls_in_flight 0.0" in service.get("/metrics", wait).body)
        assert database[ITEMS].count_documents({}) == database[HEADS].count_documents({}) == 0
        assert service.request("PUT", path, headers=A).headers["allow"] == "GET, DELETE"


def test_jobs_are_limited_in_number_and_size(site: Callable[..., Any], database: Data) -> None:
    """429 while too many are open, 422 and 413 for too large ones; a webhook needs an allowed origin."""
    limits = {"API_MAX_OPEN_JOBS": "1", "API_JOB_MAX_CONVERSATIONS": "3", "API_MAX_BATCH_BYTES": "5000"}
    with FakeOllama(slots=4, latency_s=60, user_message=0) as hanging, site(hanging, **limits) as service:
        refused = [post(service, *(item(n) for n in range(4))), post(service, item(1, id="a"), item(2, id="a"))]
        refused += [post(service, item(1), webhook="http://127.0.0.1/hook"), post(service, item(1), priority=1)]
        refused += [post(service, item(1, messages=conversation("x" * 6000)["messages"]))]
        assert [(answer.status, answer.error) for answer in refused] == [
            (422, "ValidationError"),
            (409, "DuplicateIdError"),
            (422, "ValidationError"),
            (422, "ValidationError"),
            (413, "PayloadTooLargeError"),
        ]
        assert "unknown field priority" in refused[3].json["error"]["message"]
        assert database[ITEMS].count_documents({}) == 0
        assert post(service, item(1)).status == 202
        too_many = post(service, item(2))
        assert (too_many.status, too_many.error, too_many.headers["retry-after"]) == (429, "JobLimitError", "30")
        for query in ("limit=0", "limit=1001", "offset=-1", "offset=a", "page=2", "limit=1&limit=2"):
            assert service.get(f"/jobs/{'0' * 32}?{query}").status == 422, query
        assert service.get("/jobs/nothing").status == 422


def test_requests_go_before_jobs(site: Callable[..., Any], database: Data) -> None:
    """A job of many conversations leaves a slot free, so a request does not wait for it."""
    of_jobs = [{"kind": "hang", "when": {"text": "parcel"}}]
    with (
        FakeOllama(slots=4, latency_s=0, user_message=0, faults=of_jobs) as fake,
        site(fake, API_MAX_CONCURRENT="2") as service,
    ):
        path = post(service, *(item(n) for n in range(30))).headers["location"]
        fake.wait_for("in_flight", 1)
        for number in range(3):
            assert service.classify(conversation(f"Is it {number}?")).status == 200
        assert service.get(path).json["status"] == "open"
        assert database[ITEMS].count_documents({"owner": {"$type": "string"}}) == 1


@pytest.mark.thorough
def test_without_mongodb_jobs_get_503_and_requests_their_labels(tmp_path: Path) -> None:
    """And API_EXPOSE_JOBS=off removes the routes."""
    address = {"MONGODB_URI": "mongodb://127.0.0.1:1", "MONGODB_TIMEOUT_MS": "300", "API_EMBEDDED": "true"}
    with serve(tmp_path, app=WITH_PHRASES, **address) as service:
        answer = post(service, item(1))
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "StoreUnavailableError", "5")
        assert service.classify().status == 200
    with serve(tmp_path, **{**address, "MONGODB_URI": "mongodb://<password>@a"}) as service:
        assert post(service, item(1)).error == "StoreUnavailableError"
    with serve(tmp_path, **address, API_EXPOSE_JOBS="off") as service:
        assert (post(service, item(1)).error, service.get("/jobs/1").error) == ("NotFoundError", "NotFoundError")
        assert not [path for path in service.get("/openapi.json").json["paths"] if "job" in path]
