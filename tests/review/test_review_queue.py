"""The review queue on a real mongod: order, leases, the control sample, second reviewers, and undo."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from pymongo.database import Database

from config import Settings
from error_handler import ReviewConflictError, ReviewLabelError
from mongo_client import DocumentStore
from review import queue as queue_module
from review.labels import correction_of
from review.queue import ReviewItem, ReviewQueue
from review.ranking import is_double
from storage.extended_json import id_key
from tests.review.review_site import AGREED, DEFAULTS, fill, open_queue, result

Data = Database[dict[str, Any]]


def corrections(database: Data) -> list[dict[str, Any]]:
    return list(database["sentimental_analysis_corrections"].find().sort([("source_conversation_id", 1), ("field", 1)]))


async def accept(queue: ReviewQueue, reviewer: str) -> ReviewItem | None:
    """Accept all labels of the next conversation."""
    item = await queue.next(reviewer)
    if item is not None:
        await queue.decide(reviewer, item.source_id, item.labels)
    return item


async def accepted(queue: ReviewQueue, reviewer: str) -> list[Any]:
    """Accept everything that is left; return the ids in the order in which they came."""
    ids = []
    while (item := await accept(queue, reviewer)) is not None:
        ids.append(item.source_id)
    return ids


async def test_most_doubtful_conversations_come_first(store: DocumentStore, settings: Settings, database: Data) -> None:
    """Low confidence and disagreement with the embedded classifier before results without either."""
    plain = [result(number, 0.99) for number in range(20)]
    fill(database, [*plain, result(100, 0.30), result(101, 0.99, sentiment="Positive"), result(102, 0.55)])
    order = await accepted(open_queue(store, settings), "anna")
    assert len(order) == 23
    assert set(order[:3]) == {100, 101, 102}
    assert order.index(100) < order.index(102)
    sources = {one["source_conversation_id"]: one["source"] for one in corrections(database)}
    assert (sources[100], sources[101]) == ("confidence", "disagreement") or sources[101] == "rare"


async def test_queue_works_without_confidences(store: DocumentStore, settings: Settings, database: Data) -> None:
    fill(database, [*(result(number) for number in range(10)), result(50, intent="Order Status", topic="Other")])
    assert (await accepted(open_queue(store, settings), "anna"))[0] == 50


async def test_decisions_leave_the_result_alone_and_record_who_and_when(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """One document for each field; an accepted label has from == to."""
    fill(database, [result(1, 0.5)])
    before = list(database["sentimental_analysis"].find())
    queue = open_queue(store, settings)
    item = await queue.next("anna")
    assert item is not None
    assert item.labels == AGREED
    await queue.decide("anna", 1, {**AGREED, "intent": "Order Status"}, "asks where it is")
    intent, sentiment, topic = corrections(database)
    assert {name: intent[name] for name in ("from", "to", "reviewer", "note")} == {
        "from": "Complaint",
        "to": "Order Status",
        "reviewer": "anna",
        "note": "asks where it is",
    }
    assert intent["result_fingerprint"] == "fp-1"
    assert intent["conversation_number"] == "1"
    assert intent["at"].tzinfo is not None
    assert "sampling_probability" not in intent
    assert (sentiment["from"], sentiment["to"]) == ("Negative", "Negative")
    assert topic["field"] == "topic"
    assert list(database["sentimental_analysis"].find()) == before


async def test_unknown_labels_are_refused(store: DocumentStore, settings: Settings, database: Data) -> None:
    fill(database, [result(1)])
    queue = open_queue(store, settings)
    assert await queue.next("anna")
    for labels in ({"intent": "Nonsense"}, {"priority": "Order Status"}, {"intent": ["Order Status"]}):
        with pytest.raises(ReviewLabelError, match="labels: "):
            await queue.decide("anna", 1, labels)
    assert not corrections(database)


async def test_label_that_left_the_taxonomy_can_be_accepted(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """Of an earlier taxonomy; it cannot be chosen again. Of several labels, it can be the one that stays."""
    fill(database, [result(1, intent="Gone"), result(2), result(3, topic=["Gone", "Other"])])
    queue = open_queue(store, settings)
    held = [await queue.next("ben")]
    while held[-1] is not None and held[-1].source_id != 3:
        await queue.skip("ben", held[-1].source_id)
        held.append(await queue.next("ben"))
    await queue.decide("ben", 3, {"topic": ["Gone"]})
    assert {item.labels["intent"] for item in [await accept(queue, "anna"), await accept(queue, "anna")] if item} == {
        "Gone",
        "Complaint",
    }


async def test_field_with_several_labels_is_decided_as_a_list(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """The order of the labels has no meaning."""
    fill(database, [result(1, topic=["Other", "Banking/Cards"]), result(2, topic=["Other"])])
    database["sentimental_analysis"].update_many({}, {"$unset": {"classification.intent": ""}})
    queue = open_queue(store, settings)
    for _ in range(2):
        item = await queue.next("anna")
        assert item is not None
        for wrong in (["Other", "Nonsense"], ["Other", "Other"], "Other"):
            with pytest.raises(ReviewLabelError):
                await queue.decide("anna", item.source_id, {"topic": wrong})
        with pytest.raises(ReviewLabelError, match="intent needs one label"):  # the model gave none
            await queue.decide("anna", item.source_id, {"intent": ["Other"]})
        await queue.decide("anna", item.source_id, {"topic": ["Banking/Cards", "Other"]})
    found = [correction_of(one) for one in corrections(database)]
    assert [(one.label_to, one.is_accepted) for one in found] == [
        (["Banking/Cards", "Other"], True),
        (["Banking/Cards", "Other"], False),
    ]


async def test_second_decision_of_a_reviewer_replaces_the_first(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """The unique index allows one for each reviewer, field and conversation."""
    fill(database, [result(1)])
    queue = open_queue(store, settings)
    assert await queue.next("anna")
    await queue.decide("anna", 1, {"intent": "Order Status"})
    database["sentimental_analysis_review_leases"].insert_one(
        {"_id": 1, "reviewer": "anna", "labels": AGREED, "source": "confidence"}
    )
    await queue.decide("anna", 1, {"intent": "Refund Request"})
    assert [one["to"] for one in corrections(database)] == ["Refund Request"]
    indexes = database["sentimental_analysis_corrections"].index_information()
    assert [list(dict(index["key"])) for index in indexes.values() if index.get("unique")] == [
        ["source_conversation_id", "field", "reviewer"]
    ]


async def test_undo_removes_the_last_decision_and_shows_the_conversation_again(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    fill(database, [result(number) for number in range(3)])
    queue = open_queue(store, settings)
    assert await queue.undo("anna") is None
    first, second = await accept(queue, "anna"), await accept(queue, "anna")
    assert first is not None
    assert second is not None
    again = await queue.undo("anna")
    assert again is not None
    assert (again.source_id, again.labels) == (second.source_id, AGREED)
    assert {one["source_conversation_id"] for one in corrections(database)} == {first.source_id}
    await queue.decide("anna", again.source_id, again.labels)
    assert len(corrections(database)) == 6


async def test_two_reviewers_at_once_never_get_the_same_conversation(settings: Settings, database: Data) -> None:
    """Two clients of their own, as two processes have them; each conversation is decided exactly once."""
    fill(database, [result(number, 0.5) for number in range(12)])
    stores = [DocumentStore(settings), DocumentStore(settings)]
    queues = [open_queue(one, settings) for one in stores]
    try:
        ids = await asyncio.gather(accepted(queues[0], "anna"), accepted(queues[1], "ben"))
    finally:
        for one in stores:
            await one.close()
    assert sorted(ids[0] + ids[1]) == list(range(12))
    assert ids[0]
    assert ids[1]
    assert len(corrections(database)) == 3 * 12
    assert not database["sentimental_analysis_review_leases"].count_documents({})


async def test_lease_of_a_client_that_died_expires(store: DocumentStore, settings: Settings, database: Data) -> None:
    """Until then nobody else gets the conversation; afterwards the dead client's decision is refused."""
    fill(database, [result(1)])
    dead = open_queue(store, settings)
    assert await dead.next("anna")
    other = open_queue(store, settings)
    assert await other.next("ben") is None
    leases = database["sentimental_analysis_review_leases"]
    lease = leases.find_one({})
    assert lease is not None
    leases.update_one({}, {"$set": {"expires_at": lease["expires_at"].replace(year=2020)}})
    taken = await other.next("ben")
    assert taken is not None
    assert taken.source_id == 1
    with pytest.raises(ReviewConflictError):
        await dead.decide("anna", 1, AGREED)
    await other.decide("ben", 1, AGREED)
    assert {one["reviewer"] for one in corrections(database)} == {"ben"}


async def test_reload_shows_the_conversation_that_is_held(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """Also if two windows ask at once."""
    fill(database, [result(number) for number in range(5)])
    queue = open_queue(store, settings)
    first, second = await asyncio.gather(queue.next("anna"), queue.next("anna"))
    again = await open_queue(store, settings).next("anna")
    assert first is not None
    assert second is not None
    assert again is not None
    assert first.source_id == second.source_id == again.source_id
    assert database["sentimental_analysis_review_leases"].count_documents({}) == 1


async def test_skipped_conversation_does_not_come_back_to_the_reviewer(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    fill(database, [result(number) for number in range(3)])
    queue = open_queue(store, settings)
    item = await queue.next("anna")
    assert item is not None
    await queue.skip("anna", item.source_id)
    assert item.source_id not in await accepted(queue, "anna")
    assert await accepted(queue, "ben") == [item.source_id]


async def test_control_share_of_the_turns_is_random_and_recorded(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """With its probability, so that estimates from it are valid."""
    fill(database, [result(number, 0.1 + number / 100) for number in range(20)])
    queue = open_queue(store, settings, replace(DEFAULTS, control=0.25))
    for _ in range(12):
        await accept(queue, "anna")
    turns = [one for one in corrections(database) if one["field"] == "intent"]
    drawn = [one for one in turns if one["source"] == "random"]
    assert len(drawn) == 3
    assert {one["sampling_probability"] for one in drawn} == {1 / 20}
    assert all("sampling_probability" in one for one in turns if one["source"] == "random")


async def test_session_of_one_turn_can_be_a_control_turn(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """With a share of nearly 1 it nearly always is."""
    fill(database, [result(1, 0.1)])
    await accept(open_queue(store, settings, replace(DEFAULTS, control=0.999_999)), "anna")
    assert {one["source"] for one in corrections(database)} == {"random"}


async def test_control_sample_draws_conversations_that_were_decided_for_another_reason(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """Without them it would have few doubtful ones, and errors would be underestimated."""
    fill(database, [result(number, 0.2) for number in range(6)])
    await accepted(open_queue(store, settings), "anna")
    assert not [one for one in corrections(database) if "sampling_probability" in one]
    assert await open_queue(store, settings, replace(DEFAULTS, control=1.0)).next("ben") is None
    found = corrections(database)
    assert {one["sampling_probability"] for one in found} == {1 / 6}
    assert {one["source"] for one in found} == {"confidence"}


async def test_control_sample_draws_a_conversation_that_another_reviewer_holds(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """It is recorded with the lease, and so with the decision."""
    fill(database, [result(1, 0.2)])
    anna = open_queue(store, settings)
    assert await anna.next("anna")
    assert await open_queue(store, settings, replace(DEFAULTS, control=1.0)).next("ben") is None
    await anna.decide("anna", 1, AGREED)
    assert [one["sampling_probability"] for one in corrections(database)] == [1.0] * 3


@pytest.mark.thorough
async def test_control_sample_is_uniform_although_doubtful_conversations_are_reviewed_first(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """A third of the results is doubtful, and so is a third of the sample."""
    wrong = range(20)
    fill(database, [result(number, 0.2 if number in wrong else 0.95) for number in range(60)])
    drawn: list[bool] = []
    for reviewer in range(12):
        queue = open_queue(store, settings, replace(DEFAULTS, control=0.4))
        for _ in range(30):
            await accept(queue, f"reviewer {reviewer}")
        drawn += [
            one["source_conversation_id"] in wrong
            for one in corrections(database)
            if one["field"] == "intent" and "sampling_probability" in one
        ]
        database["sentimental_analysis_corrections"].delete_many({})
    # About 200 draws: 0.12 is more than three standard errors. Without the rule above it is 0.1 and less.
    assert math.isclose(sum(drawn) / len(drawn), 1 / 3, abs_tol=0.12)


async def test_double_share_is_decided_by_two_reviewers(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    """The second one does not see the first decision, and why the conversation was chosen is kept."""
    fill(database, [result(number, 0.4) for number in range(12)])
    options = replace(DEFAULTS, double=0.3)
    expected = {number for number in range(12) if is_double(id_key(number), 0.3)}
    assert 2 <= len(expected) <= 7
    anna = open_queue(store, settings, options)
    item = await anna.next("anna")
    while item is not None:
        await anna.decide("anna", item.source_id, {**item.labels, "intent": "Order Status"})
        item = await anna.next("anna")
    ben = open_queue(store, settings, options)
    item, seen = await ben.next("ben"), []
    while item is not None:
        seen.append(item.source_id)
        assert item.labels == AGREED
        await ben.decide("ben", item.source_id, item.labels)
        item = await ben.next("ben")
    assert set(seen) == expected
    assert await accepted(open_queue(store, settings, options), "carl") == []
    assert {one["source"] for one in corrections(database)} == {"confidence"}


async def test_second_decisions_leave_the_control_sample_its_turns(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    fill(database, [result(number, 0.4) for number in range(4)])
    await accept(open_queue(store, settings, replace(DEFAULTS, double=1.0)), "anna")
    await accept(open_queue(store, settings, replace(DEFAULTS, double=1.0, control=1.0)), "ben")
    assert {one["source"] for one in corrections(database) if one["reviewer"] == "ben"} == {"random"}


async def test_last_conversations_of_a_large_collection_are_found(
    store: DocumentStore, settings: Settings, database: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random sample of a collection that is almost done would miss them."""
    monkeypatch.setattr(queue_module, "POOL", 4)
    fill(database, [result(number) for number in range(20)])
    assert sorted(await accepted(open_queue(store, settings), "anna")) == list(range(20))


async def test_conversations_that_are_gone_are_not_shown(
    store: DocumentStore, settings: Settings, database: Data
) -> None:
    fill(database, [result(number) for number in range(3)])
    database["conversation_set"].delete_one({"_id": 1})
    odd = [{"source_conversation_id": "odd", "classification": None}, {"classification": AGREED}]
    database["sentimental_analysis"].insert_many(odd)
    assert sorted(await accepted(open_queue(store, settings), "anna")) == [0, 2]
