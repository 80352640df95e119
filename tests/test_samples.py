"""The shipped sample conversations keep what data/README.md says of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator import aggregate_conversation, document_shape
from storage import extended_json

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS_FILE = ROOT / "data" / "sample_conversations.jsonl"
EXPECTED_FILE = ROOT / "data" / "sample_expected.jsonl"
README = ROOT / "data" / "README.md"
TAXONOMY_FILE = ROOT / "config" / "taxonomy.yaml"

TWEET_TIME = "%a %b %d %H:%M:%S %z %Y"
EMAIL = re.compile(r"[\w.+-]+@([\w-]+(?:\.[\w-]+)+)")
HOST = re.compile(r"(?i)\b(?:[\w-]+\.)+(?:com|net|org|io|co|uk|eu|de|fr|es|it|pt|nl|pl|se|in|jp|tr|app|ai|example)\b")
RESERVED_HOST = re.compile(r"(?i)(?:^|\.)example(?:\.com|\.net|\.org)?$")
MENTION = re.compile(r"@\w+")
LONG_NUMBER = re.compile(r"\+?\d(?:[\s().-]{0,2}\d){6,}")
FICTITIOUS_PHONE = re.compile(r"(?:^|\D)555[\s.-]?01\d\d$")
CHAT_TEMPLATE = re.compile(r"<\|im_start\|>|<\|eot_id\|>|\[INST\]|</s>")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf]")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _key(record: dict[str, Any]) -> str:
    """The ``_id`` with its type, so that a text and an ObjectId of the same letters differ."""
    return json.dumps(record["_id"], sort_keys=True)


def _entries(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document.get("tweets") or document.get("messages") or [document]


def _texts(document: dict[str, Any]) -> list[str]:
    return [entry["text"] for entry in _entries(document)]


def _times(document: dict[str, Any]) -> list[datetime]:
    """The times of the turns in the order listed; empty where a turn has none."""
    if "tweets" in document:
        return [datetime.strptime(tweet["created_at"], TWEET_TIME) for tweet in document["tweets"]]
    stamps = [message.get("timestamp") for message in document.get("messages", [])]
    return [datetime.fromisoformat(stamp) for stamp in stamps] if all(stamps) else []


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(DOCUMENTS_FILE)]


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(EXPECTED_FILE)]


@pytest.fixture(scope="module")
def by_trait(documents: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    document_of = {_key(document): document for document in documents}
    found: dict[str, list[dict[str, Any]]] = {}
    for expectation in expected:
        for trait in expectation["traits"]:
            found.setdefault(trait, []).append(document_of[_key(expectation)])
    return found


@pytest.fixture(scope="module")
def taxonomy() -> dict[str, list[str]]:
    content = yaml.safe_load(TAXONOMY_FILE.read_text(encoding="utf-8"))
    return {
        "intent": list(content["intents"]),
        "topic": list(content["topics"]),
        "sentiment": list(content["sentiments"]),
    }


def test_every_line_is_extended_json() -> None:
    for path in (DOCUMENTS_FILE, EXPECTED_FILE):
        assert path.read_bytes().endswith(b"\n")
        for line in _lines(path):
            assert "_id" in extended_json.loads(line)


def test_all_shapes_and_id_types_are_present(documents: list[dict[str, Any]]) -> None:
    assert len(documents) >= 80
    shapes = Counter(document_shape(document) for document in documents)
    assert set(shapes) == {"tweets", "messages", "query"}
    assert min(shapes.values()) >= 15
    id_types = {(document_shape(document), type(document["_id"])) for document in documents}
    assert id_types == {("tweets", dict), ("messages", str), ("messages", dict), ("query", str)}


def test_each_shape_has_its_fields(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        match document_shape(document):
            case "tweets":
                assert set(document) == {"_id", "conversation_number", "tweets", "status"}
                assert document["status"] == "pending"
                for tweet in document["tweets"]:
                    assert set(tweet) == {"tweet_id", "author_id", "inbound", "created_at", "text"}
                    assert len(tweet["text"]) <= 280, tweet["tweet_id"]
            case "messages":
                assert set(document) - {"status"} == {"_id", "conversation_number", "messages"}
                for message in document["messages"]:
                    assert set(message) - {"timestamp"} == {"sender", "text"}
                    assert message["sender"] in {"customer", "agent"}
            case _:
                assert set(document) == {"_id", "text", "metadata", "processed", "processing_attempts"}
                assert (document["processed"], document["processing_attempts"]) == (False, 0)
                assert set(document["metadata"]) == {"source", "timestamp"}
                assert datetime.fromisoformat(document["metadata"]["timestamp"]).tzinfo is not None


def test_messages_come_with_and_without_times(documents: list[dict[str, Any]]) -> None:
    timed = Counter(
        sum("timestamp" in message for message in document["messages"]) / len(document["messages"])
        for document in documents
        if "messages" in document
    )
    assert timed[1.0] >= 10
    assert timed[0.0] >= 5
    assert len(timed) == 3, "one conversation has times on some of its turns only"


def test_each_document_has_exactly_one_expectation(
    documents: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    keys = [_key(document) for document in documents]
    assert len(set(keys)) == len(keys)
    assert [_key(expectation) for expectation in expected] == keys, "one expectation per document, in the same order"
    numbers = [document.get("conversation_number") for document in documents]
    assert [expectation["conversation_number"] for expectation in expected] == numbers
    given = [number for number in numbers if number is not None]
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("label", ["intent", "topic", "sentiment"])
def test_labels_are_of_the_taxonomy_and_none_is_rare(
    label: str, expected: list[dict[str, Any]], taxonomy: dict[str, list[str]]
) -> None:
    counts = Counter(expectation["expected"][label] for expectation in expected)
    assert set(counts) == set(taxonomy[label])
    assert min(counts.values()) >= 3, counts


def test_expectations_have_their_fields(expected: list[dict[str, Any]]) -> None:
    for expectation in expected:
        assert set(expectation) == {"_id", "conversation_number", "expected", "language", "industry", "traits"}
        assert set(expectation["expected"]) == {"intent", "topic", "sentiment"}
        assert expectation["industry"]
        assert len(set(expectation["traits"])) == len(expectation["traits"])
    assert len({expectation["industry"] for expectation in expected}) >= 12


def test_many_languages(expected: list[dict[str, Any]]) -> None:
    others = [expectation for expectation in expected if expectation["language"] != "en"]
    assert len(others) >= 10
    assert len({expectation["language"] for expectation in others}) >= 6
    assert [expectation for expectation in expected if "non_english" in expectation["traits"]] == others


def test_hard_cases_are_present(by_trait: dict[str, list[dict[str, Any]]]) -> None:
    assert len(by_trait["sarcastic"]) >= 6
    assert len(by_trait["hostile"]) >= 6
    assert len(by_trait["ambiguous"]) >= 3
    assert any(len(EMOJI.findall("".join(_texts(document)))) >= 20 for document in by_trait["emoji"])
    assert all(max(map(len, _texts(document))) >= 3000 for document in by_trait["long"])
    assert all("ignore your instructions" in " ".join(_texts(d)).lower() for d in by_trait["injection"])
    assert all(CHAT_TEMPLATE.search(" ".join(_texts(document))) for document in by_trait["template_tokens"])


def test_traits_that_can_be_computed_are_right(
    documents: list[dict[str, Any]], by_trait: dict[str, list[dict[str, Any]]]
) -> None:
    for document in documents:
        conversation = aggregate_conversation(extended_json.loads(json.dumps(document)))
        assert (len(conversation.customer_texts) > 1) == (document in by_trait["multi_turn"]), document["_id"]
        times = _times(document)
        assert (times != sorted(times)) == (document in by_trait["unordered"]), document["_id"]
        assert (max(map(len, _texts(document))) >= 3000) == (document in by_trait["long"]), document["_id"]


def test_turn_order_comes_from_time(by_trait: dict[str, list[dict[str, Any]]]) -> None:
    assert sum("tweets" in document for document in by_trait["unordered"]) >= 2
    for document in by_trait["unordered"]:
        held = [text for _, text in sorted(zip(_times(document), _texts(document), strict=True))]
        turns = aggregate_conversation(document).turns
        assert [turn.text for turn in turns] == held != _texts(document)


def test_times_are_distinct_and_their_weekdays_right(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        times = _times(document)
        assert len(set(times)) == len(times), document["_id"]
        for tweet in document.get("tweets", []):
            at = datetime.strptime(tweet["created_at"], TWEET_TIME)
            assert tweet["created_at"] == at.strftime(TWEET_TIME), "strptime does not compare weekday and date"


def test_conversations_are_dialogues_that_the_customer_opens(documents: list[dict[str, Any]]) -> None:
    lengths = []
    for document in documents:
        turns = aggregate_conversation(extended_json.loads(json.dumps(document))).turns
        assert turns[0].sender == "customer", document["_id"]
        if document_shape(document) != "query":
            assert {turn.sender for turn in turns} == {"customer", "agent"}
            lengths.append(len(turns))
    assert min(lengths) >= 2
    assert max(lengths) >= 12
    assert sum(length >= 5 for length in lengths) > len(lengths) / 2


def test_texts_and_tweet_ids_are_unique(documents: list[dict[str, Any]]) -> None:
    texts = [text.strip().casefold() for document in documents for text in _texts(document)]
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    tweet_ids = [tweet["tweet_id"] for document in documents for tweet in document.get("tweets", [])]
    assert len(set(tweet_ids)) == len(tweet_ids)


def test_no_contact_that_could_be_real(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        for text in _texts(document):
            assert [host for host in EMAIL.findall(text) if not RESERVED_HOST.search(host)] == []
            assert [host for host in HOST.findall(text) if not RESERVED_HOST.search(host)] == []
            assert [n for n in LONG_NUMBER.findall(MENTION.sub("@", text)) if not FICTITIOUS_PHONE.search(n)] == []


def test_the_readme_counts_what_is_there(documents: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    stated = {}
    group = ""
    for line in README.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[1:2] == ["documents"]:
            group = cells[0]
        elif len(cells) > 1 and cells[1].isdigit():
            stated[group, cells[0]] = int(cells[1])

    counts = Counter(("shape", str(document_shape(document))) for document in documents)
    for expectation in expected:
        counts.update(expectation["expected"].items())
        counts.update(("trait", trait) for trait in expectation["traits"])
        counts.update([("language", expectation["language"]), ("industry", expectation["industry"])])
    assert stated == dict(counts)
