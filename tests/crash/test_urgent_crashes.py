"""The worker is killed with SIGKILL while urgent documents pass others; nothing is lost, nothing twice."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.crash.faulty_worker import SEAMS, URGENT_SEAMS
from tests.crash.test_crash_loop import CONCURRENCY, faults_of
from tests.worker.site import Document, Site, check_calls, check_exactly_once, documents_of_all_shapes, model_of

RULES = '[{"query": {"tier": "vip"}, "priority": 2}]'


def with_priorities(count: int, first: int = 0) -> list[Document]:
    """Return documents of all shapes, numbered from *first*: every third one is urgent, by its field or by a rule."""
    documents = documents_of_all_shapes(first + count)[first:]
    for place, document in enumerate(documents):
        if place % 6 == 1:
            document["priority"] = 1 + place % 5
        elif place % 6 == 4:
            document["tier"] = "vip"
    return documents


@pytest.mark.thorough
def test_random_kills_with_priorities(site: Site, request: pytest.FixtureRequest) -> None:
    """Documents come while the worker dies at random moments, and starts again at once."""
    kills = request.config.getoption("--kills")
    seed = request.config.getoption("--seed")
    seed = random.randrange(1_000_000) if seed is None else seed
    print(f"seed {seed}, {kills} kills")
    moments = random.Random(seed)
    documents = with_priorities(300)
    site.source.insert_many(documents)
    site.settings["PRIORITY_RULES"] = RULES
    site.settings["LEASE_S"] = "2"  # some end between two starts
    model_of(site).configure(latency_s=0.04, faults=faults_of(documents_of_all_shapes(300 + 40 * kills)))
    killed = 0
    for _ in range(kills):
        with site.start("--logs") as worker:
            time.sleep(moments.uniform(0.2, 0.8))
            late = with_priorities(40, first=len(documents))
            site.source.insert_many(late)
            documents += late
            time.sleep(moments.uniform(0.0, 0.9))
            worker.send(signal.SIGKILL)
            killed += worker.ended().code == -signal.SIGKILL
        time.sleep(moments.choice([0.0, 0.0, 2.5]))
    ended = site.run("--logs")
    assert ended.code == 0, ended.err
    assert killed > kills // 2, "most runs ended before they were killed: this proves little"
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY * killed)


@pytest.mark.thorough
@pytest.mark.parametrize("seam", [*SEAMS, *URGENT_SEAMS])
@pytest.mark.parametrize("passage", [1, 3])
def test_a_kill_at_each_point_with_priorities(site: Site, seam: str, passage: int) -> None:
    """The same command finishes the work, whichever step of either lane was the last."""
    documents = with_priorities(60)
    site.source.insert_many(documents)
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}, "times": 2} for number in (4, 12, 18, 25)]
    model_of(site).configure(latency_s=0.02, faults=faults)
    site.settings["PRIORITY_RULES"] = RULES
    killed = site.run("--logs", "--batch-size", "6", plan={"seam": seam, "passage": passage})
    assert killed.code in (0, -signal.SIGKILL), killed.err
    ended = site.run("--logs", "--batch-size", "6")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    check_calls(site, documents, repeated=CONCURRENCY)
