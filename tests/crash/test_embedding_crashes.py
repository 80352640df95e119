"""A run is killed at each step, and started again: only what was in flight is paid for twice."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_index.embedding_run import STORING_THREADS
from embedding_index.providers.contract import ModelIdentity
from embedding_index.vector_ledger import VectorLedger
from tests.embedding_index.embedding_site import keyed, texts_with_long_ones
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import OF_THE_INDEX, ForkedProcess
from tests.worker.site import until

ROOT = Path(__file__).parents[2]
MODEL = ModelIdentity("openai", "text-embedding-3-small")
COUNT, CONCURRENCY, BATCH_SIZE = 80, 3, 7

POINTS = [
    *(f"embed:before:{passage}" for passage in (1, 2, 6)),
    *(f"embed:after:{passage}" for passage in (1, 2, 5, 9)),
    *(f"add:before:{passage}" for passage in (1, 4, 16)),
    *(f"add:after:{passage}" for passage in (1, 3, 12, 18)),
    *("note_parts:before:1", "note_parts:after:1"),
]
USUAL = {"embed:after:5", "note_parts:after:1"}


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(dimensions=8) as started:
        yield started


class Crashes:
    """One ledger on disk, runs in processes, and what they were billed."""

    def __init__(self, fake: FakeOpenAI, folder: Path) -> None:
        self.fake = fake
        self.path = folder / "vectors.sqlite3"
        self._folder = folder

    def start(self, *kill: str) -> ForkedProcess:
        script = [str(ROOT / "tests/embedding_index/embedding_site.py"), self.fake.url, str(self.path)]
        script += [str(COUNT), str(CONCURRENCY), str(BATCH_SIZE), *kill]
        files = (self._folder / "out", self._folder / "err")
        return ForkedProcess(script, dict(os.environ), ROOT, files, preload=OF_THE_INDEX)

    def run(self, *kill: str) -> int:
        process = self.start(*kill)
        process.communicate(60)
        return process.wait()

    def asked(self) -> int:
        return int(self.fake.stats().get("requests:embeddings.create", 0))

    def billed(self) -> dict[str, int]:
        return {key: counts["billed"] for key, counts in self.fake.embedded().items() if counts["billed"]}

    def stored(self) -> set[str]:
        with VectorLedger(self.path) as ledger:
            return ledger.known(MODEL, self.billed())

    def check_complete(self) -> None:
        assert self.run() == 0, (self._folder / "err").read_text()
        assert (
            json.loads((self._folder / "out").read_text().splitlines()[-1])["problems"] == []
        )  # earlier runs stand before
        with VectorLedger(self.path) as ledger:
            assert len(ledger.known(MODEL, keyed(texts_with_long_ones(COUNT)))) == COUNT


@pytest.fixture
def crashes(running: FakeOpenAI, tmp_path: Path) -> Iterator[Crashes]:
    running.renew()
    running.configure(latency_s=0.01)
    yield Crashes(running, tmp_path)
    assert running.stats()["internal_errors"] == 0


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in USUAL else pytest.mark.thorough) for point in POINTS]
)
def test_a_kill_at_each_step(crashes: Crashes, point: str) -> None:
    assert crashes.run(point) == -signal.SIGKILL
    crashes.fake.wait_for("sync_in_flight", equals=0)
    billed, stored = crashes.billed(), crashes.stored()
    in_flight = billed.keys() - stored
    assert len(in_flight) <= (CONCURRENCY + STORING_THREADS) * BATCH_SIZE
    crashes.check_complete()
    assert {key for key, times in crashes.billed().items() if times > 1} == in_flight
    assert max(crashes.billed().values()) <= 2


@pytest.mark.thorough
def test_kills_at_any_moment(crashes: Crashes) -> None:
    """The process is killed repeatedly after some answers; all progress is kept."""
    moments = random.Random(11)
    kills = 0
    crashes.fake.configure(latency_s=0.2)
    for _ in range(4):
        asked = crashes.asked()
        process = crashes.start()
        try:
            number = asked + CONCURRENCY + moments.randint(0, 1)
            ended = process.poll
            until(lambda n=number, ended=ended: crashes.asked() >= n or ended() is not None)
        finally:
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2, "most runs ended before they were killed: this proves little"
    crashes.fake.wait_for("sync_in_flight", equals=0)
    crashes.fake.configure(latency_s=0)
    before, stored = crashes.billed(), crashes.stored()
    assert stored
    crashes.check_complete()
    after = crashes.billed()
    assert all(after[key] == before[key] for key in stored), "what was stored was paid for again"
    assert sum(after.values()) - len(after) <= kills * (CONCURRENCY + STORING_THREADS) * BATCH_SIZE
