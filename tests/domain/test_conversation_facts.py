"""What a result says about its conversation: times, turns, channel and short metadata, never text."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from aggregator import aggregate_conversation
from config import load_settings
from domain.conversation import MAX_METADATA_CHARACTERS, MAX_METADATA_VALUES, ConversationFacts, ResultOptions
from error_handler import ConfigurationError


def facts(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return ConversationFacts.of(document, aggregate_conversation(document), names or ("channel",)).as_dict()


def turns(*times: Any) -> list[dict[str, Any]]:
    return [{"sender": "customer", "text": f"text {n}", "timestamp": time} for n, time in enumerate(times)]


def at(day: int, hour: int = 0) -> datetime:
    return datetime(2026, 3, day, hour, tzinfo=UTC)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"messages": turns("2026-03-03T02:00:00+02:00", "2026-03-01")}, (at(1), at(3), 2)),
        ({"messages": turns(None, "2026-03-02"), "created_at": "2026-03-09"}, (at(2), at(2), 2)),
        ({"messages": turns("yesterday"), "created_at": at(4, 5)}, (at(4, 5), at(4, 5), 1)),
        ({"text": "a", "metadata": {"timestamp": 1772323200}}, (at(1), at(1), 1)),
        ({"text": "a", "created_at": "soon", "metadata": {"created_at": "2026-03-02"}}, (at(2), at(2), 1)),
        ({"text": "a"}, (None, None, 1)),
        ({"messages": turns("0001-01-01T00:00:00+05:00", "2026-03-01")}, (at(1), at(1), 2)),
        ({"messages": turns("0001-01-01T00:00:00+01:00"), "created_at": "2026-03-02"}, (at(2), at(2), 1)),
    ],
)
def test_times_come_from_the_turns_or_the_document(document: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = facts(document)
    assert (found.get("started_at"), found.get("last_message_at"), found["turns"]) == expected
    assert found.keys() <= {"started_at", "last_message_at", "turns"}


def test_channel_and_short_values_are_copied() -> None:
    """From the top level or the metadata, by the names of RESULT_METADATA."""
    document = {
        "text": "a",
        "channel": " e-mail\u202e",
        "priority": 2,
        "metadata": {"channel": "web", "tags": ["vip", {"deep": 1}, "x" * 101], "plan": "", "closed": True},
    }
    assert facts(document)["channel"] == "e-mail"
    found = facts(document, "tags", "priority", "plan", "closed", "none")
    assert found == {"turns": 1, "metadata": {"tags": ["vip"], "priority": 2, "closed": True}}


def test_facts_hold_no_text_and_are_bounded() -> None:
    metadata = {"long": "x" * (MAX_METADATA_CHARACTERS + 1), "many": list(range(1000)), "object": {"a": "b"}}
    found = facts({"text": "a", "channel": {"name": "web"}, "metadata": metadata}, "channel", *metadata)
    assert found == {"turns": 1, "metadata": {"many": list(range(MAX_METADATA_VALUES))}}


@pytest.mark.parametrize(("given", "expected"), [("", ("channel",)), ("priority, plan", ("priority", "plan"))])
def test_fields_are_set_by_name(given: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESULT_METADATA", given)
    assert ResultOptions.of(load_settings(dotenv=None)).metadata == expected


@pytest.mark.parametrize("given", ["a.b", "$where", "text", "channel,tweets", ",".join(f"f{n}" for n in range(21))])
def test_fields_with_text_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESULT_METADATA", given)
    with pytest.raises(ConfigurationError, match="RESULT_METADATA"):
        load_settings(dotenv=None)
