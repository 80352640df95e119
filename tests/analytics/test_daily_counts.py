"""Counts kept by day give the same figures as the results themselves."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.database import Database

from analytics import daily_counts
from analytics.aggregates import LabelAnalytics
from analytics.slices import NO_CHANNEL, Slice
from config import Taxonomy, load_settings
from config.taxonomy import Field, Label
from embedded.mongod import EmbeddedMongod
from mongo_client import DocumentStore
from tests.analytics.made_results import START, correction, result

Place = Database[dict[str, Any]]
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LABELS = {"topic": ("A", "B", "C"), "sentiment": ("Good", "Bad"), "products": ("X", "Y")}
TAXONOMY = Taxonomy(
    tuple(
        Field(name, tuple(Label(label, "") for label in labels), is_multiple=name == "products")
        for name, labels in LABELS.items()
    )
)
NEW_YORK = "America/New_York"  # its clocks change on 2026-11-01
COUNTS = "sentimental_analysis_counts"
FIRST = datetime(2026, 10, 28, 3, tzinfo=UTC)
VIEWS = (
    Slice(),
    Slice(channel="chat"),
    Slice(channel=NO_CHANNEL),
    Slice(model="m2"),
    Slice(since=FIRST + 2 * DAY),
    Slice(until=datetime(2026, 11, 2, 5, tzinfo=UTC), model="m1"),  # midnight in New York
    Slice(since=FIRST + 1.3 * DAY, until=FIRST + 6.2 * DAY, channel="email"),
    Slice(since=FIRST + 2 * HOUR, until=FIRST + 7 * HOUR),
    Slice(labels=(("topic", "A"),)),
    Slice(confidence=(0.5, 0.75)),
)


@pytest.fixture
async def open_analytics(mongodb_uri: str, db_name: str) -> AsyncIterator[Callable[..., LabelAnalytics]]:
    """Return a function that opens the analytics of this test's database."""
    settings = load_settings(None, mongodb_uri=mongodb_uri, db_name=db_name)
    store = DocumentStore(settings)
    await store.ensure_result_indexes()
    yield lambda time_zone="UTC": LabelAnalytics(store, settings, TAXONOMY, time_zone)
    await store.close()


def silent(done: int, total: int) -> None:
    """Show no progress."""


async def figures(analytics: LabelAnalytics, view: Slice) -> list[Any]:
    """Return all figures of *view*, rounded where their sums are."""
    counts = [
        await analytics.field_counts(name, by, view, is_corrected=is_corrected)
        for name, by in (("topic", "week"), ("sentiment", "day"), ("products", "day"))
        for is_corrected in (True, False)
    ]
    crossed = [
        await analytics.crossed(*pair, view)
        for pair in (("topic", "sentiment"), ("sentiment", "topic"), ("topic", "products"))
    ]
    confidences = await analytics.confidences(view)
    means = {name: round(mean, 9) for name, mean in confidences.means.items()}
    models = sorted(await analytics.models(view), key=lambda one: (one.model, one.digest, one.prompt))
    return [counts, crossed, confidences.bins, confidences.without, means, models]


class Changes:
    """Random changes of a collection, as workers, people and administrators make them."""

    def __init__(self, database: Place, seed: int) -> None:
        self._drawn = random.Random(seed)
        self._results, self._corrections = database.sentimental_analysis, database.sentimental_analysis_corrections
        self._labelled = START
        self._known: list[dict[str, Any]] = []

    def some(self, count: int) -> None:
        """Make *count* changes."""
        for _ in range(count):
            self._drawn.choices((self._insert, self._replace, self._correct, self._delete), (4, 3, 3, 1))[0]()

    def _made(self) -> dict[str, Any]:
        drawn = self._drawn
        labels: dict[str, Any] = {name: drawn.choice(of) for name, of in LABELS.items()}
        labels["products"] = drawn.choice((["X"], ["X", "Y"], [], None))
        if drawn.random() < 0.2:
            labels = drawn.choice(({}, {"topic": 7}, {"sentiment": "Bad"}, {"topic": {"$ne": 1}}))
        at = FIRST + 9 * DAY * drawn.random() if drawn.random() < 0.9 else drawn.choice((None, 7))
        confidence = drawn.choice((None, 3.0, drawn.random()))
        one = result(labels, at, channel=drawn.choice(("email", "chat", None, 7)), confidence=confidence)
        one["created_at"] = drawn.choice((FIRST + 8 * DAY, "yesterday"))
        self._labelled += timedelta(milliseconds=1 + 9000 * drawn.random())
        one["processing_metadata"] |= {"processed_at": self._labelled, "model_used": drawn.choice(("m1", "m2"))}
        return one

    def _insert(self) -> None:
        self._known.append(self._made())
        self._results.insert_one(self._known[-1])

    def _replace(self) -> None:
        if self._known:
            old = self._drawn.choice(self._known)
            new = self._made() | {name: old[name] for name in ("_id", "source_conversation_id")}
            self._results.replace_one({"_id": old["_id"]}, new)
            self._known[self._known.index(old)] = new

    def _correct(self) -> None:
        if self._known:
            name = self._drawn.choice(tuple(LABELS))
            label = ["Y"] if name == "products" else self._drawn.choice(LABELS[name])
            decision = correction(self._drawn.choice(self._known), name, label)
            key = {name: decision[name] for name in ("source_conversation_id", "field")}
            self._corrections.replace_one(key, decision, upsert=True)

    def _delete(self) -> None:
        if self._known:
            gone = self._known.pop(self._drawn.randrange(len(self._known)))
            self._results.delete_one({"_id": gone["_id"]})


async def same_figures(
    database: Place, open_analytics: Callable[..., LabelAnalytics], seed: int, rounds: int, zones: tuple[str, ...]
) -> None:
    """Compare the figures of counts that were kept over several changes with those of the results."""
    changes = Changes(database, seed)
    for number in range(rounds):
        changes.some(40 if number == 0 else 6)
        for zone in zones:
            of_counts, of_results = open_analytics(zone), open_analytics(zone)
            for view in VIEWS:
                note = await of_counts.refresh(view, silent)
                assert bool(note) == bool(view.labels or view.confidence)
                assert await figures(of_counts, view) == await figures(of_results, view), (number, zone, view)


async def test_figures_are_those_of_the_results_after_any_change(database: Place, open_analytics: Any) -> None:
    await same_figures(database, open_analytics, 1, 2, (NEW_YORK,))


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2, 8))
async def test_figures_are_those_of_the_results_after_many_changes(
    database: Place, open_analytics: Any, seed: int
) -> None:
    await same_figures(database, open_analytics, seed, 8, ("UTC", NEW_YORK))


async def test_counts_answer_without_a_look_at_the_results(database: Place, open_analytics: Any) -> None:
    analytics = open_analytics()
    one, other = result({"topic": "A"}, FIRST), result({"topic": "B"}, FIRST + DAY)
    database.sentimental_analysis.insert_many([one, other])
    seen: list[tuple[int, int]] = []
    assert await analytics.refresh(Slice(), lambda *done: seen.append(done)) == ""
    assert seen == [(0, 2)]
    database.sentimental_analysis.delete_many({})
    assert (await analytics.field_counts("topic")).total.labels == {"A": 1, "B": 1}
    await analytics.refresh(Slice(), silent)
    assert (await analytics.field_counts("topic")).total.n == 0
    assert database[COUNTS].count_documents({}) == 0


async def test_only_days_that_changed_are_counted_again(database: Place, open_analytics: Any) -> None:
    analytics = open_analytics()
    results = [result({"topic": "A"}, FIRST + number * DAY) for number in range(3)]
    database.sentimental_analysis.insert_many(results)
    await analytics.refresh(Slice(), silent)
    database[COUNTS].update_many({}, {"$set": {"old": True}})
    labelled_again = {"processing_metadata.processed_at": START + HOUR, "classification.topic": "B"}
    database.sentimental_analysis.update_one({"_id": results[1]["_id"]}, {"$set": labelled_again})
    await analytics.refresh(Slice(), silent)
    assert [one["day"] for one in database[COUNTS].find({"old": None})] == ["2026-10-29"]
    assert (await analytics.field_counts("topic")).total.labels == {"A": 2, "B": 1}


async def test_counts_need_no_index(database: Place, open_analytics: Any) -> None:
    """The first report after an upgrade may come before a worker has made the index."""
    database.sentimental_analysis.drop_indexes()
    database.sentimental_analysis.insert_one(result({"topic": "A"}, FIRST))
    analytics = open_analytics()
    assert await analytics.refresh(Slice(), silent) == ""
    assert (await analytics.field_counts("topic")).total.n == 1


async def test_too_many_days_are_counted_from_the_results(
    database: Place, open_analytics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_counts, "MAX_DAYS", 1)
    database.sentimental_analysis.insert_many([result({"topic": "A"}, FIRST + number * DAY) for number in range(2)])
    analytics = open_analytics()
    assert "of more than 1 days" in await analytics.refresh(Slice(), silent)
    assert (await analytics.field_counts("topic")).total.n == 2
    assert database[COUNTS].count_documents({}) == 0


@pytest.mark.thorough
async def test_without_the_right_to_write_counts_the_results_are_counted(tmp_path: Path) -> None:
    name, password = "customer_support", "secret-of-a-test"
    with EmbeddedMongod(tmp_path / "db") as mongod, MongoClient[dict[str, Any]](mongod.uri) as client:
        client.admin.command("createUser", "reader", pwd=password, roles=[{"role": "read", "db": name}])
        client[name].sentimental_analysis.insert_one(result({"topic": "A"}, FIRST))
    with EmbeddedMongod(tmp_path / "db", extra_arguments=["--auth"]) as mongod:
        uri = mongod.uri.replace("//", f"//reader:{password}@")
        settings = load_settings(None, mongodb_uri=uri, db_name=name)
        store = DocumentStore(settings)
        analytics = LabelAnalytics(store, settings, TAXONOMY)
        assert "no right to write sentimental_analysis_counts" in await analytics.refresh(Slice(), silent)
        assert (await analytics.field_counts("topic")).total.n == 1
        await store.close()
