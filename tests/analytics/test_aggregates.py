"""Counts of labels, on a real MongoDB."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Timestamp
from pymongo.database import Database

from analytics import aggregates
from analytics.aggregates import LabelAnalytics
from analytics.label_report import Crossing
from analytics.report_page import crossing_chart
from analytics.slices import NO_CHANNEL, Slice
from config import Taxonomy, load_settings
from config.taxonomy import Field, Label
from mongo_client import DocumentStore
from tests.analytics.made_results import START, correction, result

Place = Database[dict[str, Any]]
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TAXONOMY = Taxonomy(
    tuple(
        Field(name, tuple(Label(label, "") for label in labels), is_multiple=name == "products")
        for name, labels in {"topic": ("A", "B", "C"), "sentiment": ("Good", "Bad"), "products": ("X", "Y")}.items()
    )
)


@pytest.fixture
async def store(mongodb_uri: str, db_name: str) -> AsyncIterator[DocumentStore]:
    opened = DocumentStore(load_settings(None, mongodb_uri=mongodb_uri, db_name=db_name))
    yield opened
    await opened.close()


@pytest.fixture
def analytics(store: DocumentStore, mongodb_uri: str, db_name: str) -> Callable[..., LabelAnalytics]:
    """Return a function that opens the analytics of this test's database."""
    settings = load_settings(None, mongodb_uri=mongodb_uri, db_name=db_name)
    return lambda time_zone="UTC": LabelAnalytics(store, settings, TAXONOMY, time_zone)


def fill(database: Place, results: list[dict[str, Any]], corrections: list[dict[str, Any]] | None = None) -> None:
    database.sentimental_analysis.insert_many(results)
    if corrections:
        database.sentimental_analysis_corrections.insert_many(corrections)


async def test_latest_correction_replaces_the_label_of_the_model(database: Place, analytics: Any) -> None:
    one, other = result({"topic": "A"}), result({"topic": "A"}, channel="chat")
    decisions = [
        correction(one, "topic", "C", at=START + 2 * DAY),
        correction(one, "topic", "B", at=START, reviewer="bob"),
        correction(one, "gone", "X"),  # a field that the taxonomy had once
    ]
    fill(database, [one, other], decisions)
    counts = await analytics().field_counts("topic")
    assert (counts.total.n, counts.total.labels) == (2, {"A": 1, "C": 1})
    assert counts.channels["email"].labels == {"C": 1}
    of_model = await analytics().field_counts("topic", is_corrected=False)
    assert of_model.total.labels == {"A": 2}
    assert await analytics().corrected() == 1


@pytest.mark.parametrize("odd", ["Complaint", None, 7])
async def test_correction_of_a_result_without_labels_counts_alone(database: Place, analytics: Any, odd: Any) -> None:
    """Another program may write anything as the classification. The other results still count, as does the decision."""
    one, other = result({"topic": "A"}), result({"topic": "A"})
    fill(database, [one | {"classification": odd}, other], [correction(one, "topic", "B", sampling_probability=0.1)])
    opened = analytics()
    for _ in range(2):  # from the results, then from the counts of days
        assert (await opened.field_counts("topic")).total.labels == {"A": 1, "B": 1}
        await opened.refresh(Slice(), lambda done, total: None)
    assert await opened.gold_pairs("topic") == {}
    assert len(await opened.examples(order="newest")) == 2


async def test_label_filter_means_corrected_labels(database: Place, analytics: Any) -> None:
    """Also for the other fields, for pairs of fields, and if the corrected label is outside of the slice."""
    results = [result({"topic": "A", "sentiment": "Bad"}) for _ in range(4)]
    fill(database, results, [correction(results[0], "topic", "B"), correction(results[1], "sentiment", "Good")])
    of_a, of_b = Slice(labels=(("topic", "A"),)), Slice(labels=(("topic", "B"),))
    assert (await analytics().field_counts("sentiment", view=of_a)).total.labels == {"Bad": 2, "Good": 1}
    assert (await analytics().field_counts("sentiment", view=of_b)).total.labels == {"Bad": 1}
    assert await analytics().crossed("topic", "sentiment", of_a) == ({("A", "Bad"): 2, ("A", "Good"): 1}, {"A": 3})
    assert sum(one.n for one in await analytics().models(of_b)) == 1


async def test_correction_of_a_result_that_is_gone_counts_nothing(database: Place, analytics: Any) -> None:
    one = result({"topic": "A"})
    fill(database, [one], [correction(result({"topic": "B"}), "topic", "C")])
    assert (await analytics().field_counts("topic")).total.labels == {"A": 1}
    assert await analytics().corrected() == 0


async def test_weeks_are_iso_weeks_in_the_time_zone(database: Place, analytics: Any) -> None:
    """A conversation of Sunday 23:30 in UTC belongs to the next week in Berlin, and 2027-01-01 to week 53 of 2026."""
    fill(database, [result({"topic": "A"}, START - HOUR / 2), result({"topic": "B"}, datetime(2027, 1, 1, tzinfo=UTC))])
    in_utc = await analytics().field_counts("topic")
    assert list(in_utc.periods) == ["2026-W35", "2026-W53"]
    in_berlin = await analytics("Europe/Berlin").field_counts("topic")
    assert list(in_berlin.periods) == ["2026-W36", "2026-W53"]
    days = await analytics("Europe/Berlin").field_counts("topic", "day")
    assert list(days.periods) == ["2026-08-31", "2027-01-01"]


async def test_time_is_that_of_the_last_message_or_else_of_the_result(database: Place, analytics: Any) -> None:
    fill(database, [result({"topic": "A"}, START), result({"topic": "B"}, None, created_at=START + 7 * DAY)])
    counts = await analytics().field_counts("topic")
    assert {period: dict(one.labels) for period, one in counts.periods.items()} == {
        "2026-W36": {"A": 1},
        "2026-W37": {"B": 1},
    }
    later = Slice(since=START + DAY, until=START + 8 * DAY)
    assert (await analytics().field_counts("topic", view=later)).total.labels == {"B": 1}


@pytest.mark.parametrize("odd", ["yesterday", 7, None, [], Timestamp(1, 1), {"at": 1}])
async def test_odd_time_is_no_period_and_no_error(database: Place, analytics: Any, odd: Any) -> None:
    one = result({"topic": "A"}, None, created_at=odd)
    one["conversation"]["last_message_at"] = odd
    fill(database, [one])
    counts = await analytics().field_counts("topic", "day")
    assert (counts.total.n, counts.periods) == (1, {})
    assert (await analytics().models())[0].last is None
    assert (await analytics().field_counts("topic", view=Slice(since=START))).total.n == 0


async def test_date_beyond_the_calendar_is_no_period_and_no_error(database: Place, analytics: Any) -> None:
    from bson.datetime_ms import DatetimeMS

    fill(database, [result({"topic": "A"}, DatetimeMS(2**60), created_at=DatetimeMS(-(2**60)))])  # type: ignore[arg-type]
    assert (await analytics().field_counts("topic")).periods == {}
    assert (await analytics().examples(order="newest"))[0].at is None


async def test_channels_that_are_no_text_count_as_no_channel(database: Place, analytics: Any) -> None:
    channels = ["email", "email", None, 7, ["chat"]]
    fill(database, [result({"topic": "A"}, channel=channel) for channel in channels])
    counts = await analytics().field_counts("topic")
    assert {name: one.n for name, one in counts.channels.items()} == {NO_CHANNEL: 3, "email": 2}
    assert (await analytics().field_counts("topic", view=Slice(channel=NO_CHANNEL))).total.n == 3
    assert (await analytics().field_counts("topic", view=Slice(channel="email"))).total.n == 2


async def test_each_channel_and_label_is_a_filter_that_finds_its_results(database: Place, analytics: Any) -> None:
    """A link of the dashboard leads to the results that it counts. What no filter can name ends with an ellipsis."""
    names = ["email", "Web  form", "x" * 200, "", "x" * 201, "a\tb", "…\n"]
    fill(database, [result({"topic": name or "A"}, channel=name) for name in names for _ in range(2)])
    counts = await analytics().field_counts("topic")
    assert all(name.isprintable() and len(name) <= 200 for name in [*counts.channels, *counts.total.labels])
    for channel, one in counts.channels.items():
        found = (await analytics().field_counts("topic", view=Slice(channel=channel))).total.n
        assert found == (0 if channel.endswith("…") else one.n), channel
    for label, n in counts.total.labels.items():
        found = (await analytics().field_counts("topic", view=Slice(labels=(("topic", label),)))).total.n
        assert found == (0 if label.endswith("…") else n), label
    assert sum(name.endswith("…") for name in counts.channels) == 3


async def test_several_labels_of_a_field_count_each(database: Place, analytics: Any) -> None:
    """A share is one of results: those of a row can add up to more than 100 %."""
    results = [result({"topic": "A", "products": labels}) for labels in (["X", "Y"], ["Y"], [])]
    fill(database, results, [correction(results[2], "products", ["X"])])
    counts = (await analytics().field_counts("products")).total
    assert (counts.n, counts.labels) == (3, {"X": 2, "Y": 2})
    shown = crossing_chart(Crossing("topic", "products", *await analytics().crossed("topic", "products"))).table
    assert '<th scope="row">A</th><td>3</td><td>66.7 %</td><td>66.7 %</td>' in shown


async def test_labels_that_are_no_texts_are_not_counted(database: Place, analytics: Any) -> None:
    odd: list[Any] = [7, None, {"$ne": 1}, ["A", 7]]
    fill(database, [result({"topic": label}) for label in ["A", "B\n\x1b[31m" + "x" * 900, *odd]])
    counts = (await analytics().field_counts("topic")).total
    assert counts.n == 2
    assert max(map(len, counts.labels)) <= aggregates.MAX_CHARACTERS
    assert all(label.isprintable() for label in counts.labels)


async def test_filter_with_operators_in_its_texts_matches_nothing(database: Place, analytics: Any) -> None:
    fill(database, [result({"topic": "A"})])
    for view in (Slice(channel="$conversation.channel"), Slice(labels=(("topic", "$gt"),)), Slice(model=".*")):
        assert (await analytics().field_counts("topic", view=view)).total.n == 0


async def test_confidences_are_the_lowest_of_each_result(database: Place, analytics: Any) -> None:
    results = [result({"topic": "A", "sentiment": "Bad"}, confidence=value) for value in (0.0, 0.51, 1.0, None, 3.0)]
    results[1]["processing_metadata"]["confidence"]["sentiment"] = 0.9
    fill(database, results)
    found = await analytics().confidences()
    assert {place: n for place, n in enumerate(found.bins) if n} == {0: 1, 10: 1, aggregates.BINS - 1: 1}
    assert found.without == 2
    assert found.means == {"topic": pytest.approx(1.51 / 3), "sentiment": pytest.approx(1.9 / 3)}
    assert (await analytics().field_counts("topic", view=Slice(confidence=(0.5, 0.6)))).total.n == 1


async def test_models_are_named_with_digest_prompt_and_times(database: Place, analytics: Any) -> None:
    results = [result({"topic": "A"}, START + number * DAY) for number in range(3)]
    results[2]["processing_metadata"] |= {"model_used": "other", "plan": "p1"}
    fill(database, results)
    found = await analytics().models()
    assert [(one.model, one.prompt, one.n) for one in found] == [("qwen3:8b", "", 2), ("other", "p1", 1)]
    assert (found[0].first, found[0].last) == (START, START + DAY)
    assert await analytics().models(Slice(model="other")) == found[1:]


async def test_failures_are_counted_by_reason_without_the_text_after_it(database: Place, analytics: Any) -> None:
    reasons = ["timeout: no answer", "timeout: canary-4711", "canary-4711", None, 7]
    database.conversation_set.insert_many([{"status": "failed", "status_reason": reason} for reason in reasons])
    database.conversation_set.insert_many(
        [{"status": "processed"}, {"status": "skipped", "status_reason": "skipped_no_text: x"}]
    )
    assert await analytics().failures() == {"failed": {"timeout": 2, "other": 3}, "skipped": {"skipped_no_text": 1}}


async def test_gold_pairs_are_of_the_control_sample_in_the_slice(database: Place, analytics: Any) -> None:
    results = [result({"topic": "A"}, channel=channel) for channel in ("email", "email", "chat")]
    drawn = [
        correction(one, "topic", label, sampling_probability=0.1) for one, label in zip(results, "ABC", strict=True)
    ]
    fill(database, [*results, result({"topic": "A"})], [*drawn, correction(results[0], "sentiment", "Bad")])
    database.sentimental_analysis_corrections.insert_one(correction(results[1], "topic", "C", reviewer="bob"))
    assert await analytics().gold_pairs("topic") == {(("A",), ("A",)): 1, (("B",), ("A",)): 1, (("C",), ("A",)): 1}
    assert await analytics().gold_pairs("topic", Slice(channel="chat")) == {(("C",), ("A",)): 1}


async def test_examples_are_ids_with_labels_and_no_text(database: Place, analytics: Any) -> None:
    results = [result({"topic": "A"}, START + number * DAY, confidence=number / 10) for number in range(6)]
    of_an_earlier_taxonomy = correction(results[1], "gone", "X")  # it hides nothing
    fill(database, results, [correction(results[0], "topic", "B", at=START), of_an_earlier_taxonomy])
    lowest = await analytics().examples(limit=2)
    assert [one.confidence for one in lowest] == [0.1, 0.2]  # the lowest of all was reviewed
    newest = await analytics().examples(order="newest", limit=6)
    assert [one.document_id for one in newest] == [one["source_conversation_id"] for one in reversed(results)]
    assert (newest[-1].labels, newest[-1].label_source) == ({"topic": ("B",)}, "human")
    assert "quotes" not in repr(newest)
    assert [one.labels["topic"] for one in await analytics().examples(Slice(labels=(("topic", "B"),)), "newest")] == [
        ("B",)
    ]


async def test_examples_are_found_after_any_number_of_decisions(database: Place, analytics: Any) -> None:
    results = [result({"topic": "A"}, confidence=number / 1000) for number in range(700)]
    fill(database, results, [correction(one, "topic", "A") for one in results[:650]])
    found = await analytics().examples(limit=3)
    assert [one.confidence for one in found] == [0.65, 0.651, 0.652]


async def test_groups_are_limited(database: Place, analytics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection with a label for each result does not become a list of results."""
    monkeypatch.setattr(aggregates, "LARGEST", ({"$sort": {"n": -1}}, {"$limit": 5}))
    monkeypatch.setattr(aggregates, "MAX_GROUPS", 5)
    fill(database, [result({"topic": f"T{number}"}) for number in range(9)])
    counts = await analytics().field_counts("topic")
    assert (len(counts.total.labels), counts.is_cut) == (5, True)


async def test_empty_collections_are_no_error(analytics: Any) -> None:
    assert (await analytics().field_counts("topic")).total.n == 0
    assert await analytics().models() == []
    assert await analytics().examples() == []
    assert (await analytics().confidences()).without == 0
