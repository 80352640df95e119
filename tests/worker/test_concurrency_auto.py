"""``--max-concurrent auto`` in real processes: the limit follows a model server that changes its slots in mid-run."""

from __future__ import annotations

import json
import re

import pytest

from tests.worker.site import Site, WorkerProcess, check_exactly_once, conversation, until


def progress(site: Site) -> dict[str, object]:
    """Return the newest state in the progress file."""
    files = site.files("progress/*.json")
    return json.loads(files[0].read_bytes()) if files else {}


def await_limit(site: Site, worker: WorkerProcess, least: int, most: int) -> None:
    """Return as soon as the progress file has a limit in that range, while the run is under way."""

    def is_there() -> bool:
        assert worker.process.poll() is None, worker.err_so_far()
        return least <= int(str(progress(site).get("concurrency_limit") or 0)) <= most

    until(is_there, 120)


@pytest.mark.timeout(400)
@pytest.mark.thorough
def test_auto_limit_follows_the_slots_up_and_down(site: Site) -> None:
    """4 slots, then 12, then 3: within one run, as the progress file and the log tell; nothing is lost on the way."""
    assert site.model is not None
    site.model.configure(slots=4, latency="lognormal", mean_s=0.15, sigma=0.8)
    documents = [conversation(number) for number in range(1200)]
    site.source.insert_many(documents)
    with site.start("--max-concurrent", "auto", "--progress-files", "--logs", "--console") as worker:
        await_limit(site, worker, 4, 5)
        site.model.configure(slots=12)
        await_limit(site, worker, 11, 14)
        site.model.configure(slots=3)
        await_limit(site, worker, 2, 4)
        site.model.configure(slots=40, latency=None, latency_s=0.005)  # enough seen: to the end
        ended = worker.ended(200)
    assert ended.code == 0, ended.said
    assert progress(site)["concurrency_limit"] is not None
    check_exactly_once(site, documents)
    assert re.search(r"\d in flight, limit \d", ended.err)
    changes = re.findall(r"model calls in flight: at most \d+ now, \d+ before", ended.err)
    assert changes
    assert len(changes) < 12
