"""Several workers share one collection by leases; one that dies loses its documents to the others."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from tests.worker.site import (
    Site,
    check_calls,
    check_directory,
    check_results,
    check_statuses,
    conversation,
    documents_of_all_shapes,
    until,
    user_message,
)

CONCURRENCY = 6


def await_expiry(site: Site) -> None:
    """Return when no lease is valid any more."""
    leases = site.database["conversation_set_leases"]
    until(lambda: leases.count_documents({"expires_at": {"$gt": datetime.now(UTC)}}) == 0)


@pytest.mark.slow
def test_other_workers_take_over_after_a_death(site: Site) -> None:
    """Each document is asked for once, but for those in flight at the death; none has two results."""
    documents = documents_of_all_shapes(120)
    site.source.insert_many(documents)
    assert site.model is not None
    site.model.configure(slots=2 * CONCURRENCY, latency_s=0.1)
    site.settings["LEASE_S"] = "3"
    places = [site.sibling(f"worker_{number}") for number in range(2)]
    with ExitStack() as stack:
        workers = [stack.enter_context(place.start("--logs")) for place in places]
        site.model.wait_for("in_flight", at_least=2 * CONCURRENCY, timeout_s=30)
        workers[0].send(signal.SIGKILL)
        assert workers[0].ended().code == -signal.SIGKILL
        for worker in workers[1:]:
            ended = worker.ended()
            assert ended.code == 0, ended.err
    assert places[0].files("pending/*.json"), "it had nothing in work: this proves nothing"
    await_expiry(site)
    ended = places[1].run("--logs")
    assert ended.code == 0, ended.err
    check_results(site, [document for document in documents if user_message(document) is not None])
    check_statuses(site, documents)
    for place in places[1:]:
        check_directory(place)
    asked = site.model.stats()["chat_requests"]
    ended = places[0].run("--logs")  # the dead one comes back, and finds its work done
    assert ended.code == 0, ended.err
    assert site.model.stats()["chat_requests"] == asked
    check_directory(places[0])
    check_results(site, [document for document in documents if user_message(document) is not None])
    check_statuses(site, documents)
    # Those in flight, and those whose answers only the dead one's journal has.
    check_calls(site, documents, repeated=2 * CONCURRENCY)


def test_valid_lease_is_respected(site: Site) -> None:
    """The claims of a dead worker remain until the lease ends; the same worker takes them up again at once."""
    documents = documents_of_all_shapes(60)
    site.source.insert_many(documents)
    killed = site.run("--batch-size", "30", plan={"seam": "answered", "passage": 5})
    assert killed.code == -signal.SIGKILL
    assert site.model is not None
    other = site.sibling("other_files")
    ended = other.run("--logs")
    assert ended.code == 0, ended.err
    left = site.source.count_documents({"status": "processing"})
    assert left > 0, "it took documents that another worker holds"
    assert site.run("--logs").code == 0
    check_results(site, [document for document in documents if user_message(document) is not None])
    check_statuses(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)


@pytest.mark.thorough
def test_worker_that_returns_respects_leases_taken_over_meanwhile(site: Site) -> None:
    """Its own files name them, and all the same it leaves them to the worker that holds the leases now."""
    documents = [conversation(number) for number in range(CONCURRENCY)]
    site.source.insert_many(documents)
    assert site.model is not None
    site.settings["LEASE_S"] = "2"
    site.model.configure(latency_s=60.0)
    with site.start() as worker:
        site.model.wait_for("in_flight", equals=CONCURRENCY, timeout_s=30)
        worker.send(signal.SIGKILL)
        worker.ended()
    site.model.wait_for("in_flight", equals=0)
    await_expiry(site)
    site.model.configure(latency_s=4.0)
    with site.sibling("other_files").start() as other:
        site.model.wait_for("in_flight", equals=CONCURRENCY, timeout_s=30)
        assert site.run().code == 0
        assert site.model.stats()["answered"] == 0, "the other one was done already: this proves nothing"
        assert other.ended().code == 0
    check_results(site, documents)
    check_statuses(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)
