"""Which turns of a newer export a stored conversation lacks."""

from __future__ import annotations

from typing import Any

import pytest

from help_desks.grown import compared

AT = "2026-03-02T09:14:05Z"


def turn(text: str, turn_id: Any = None, at: str | None = None, sender: str = "customer") -> dict[str, Any]:
    made: dict[str, Any] = {"sender": sender, "text": text}
    return made | ({"timestamp": at} if at else {}) | ({"metadata": {"id": turn_id}} if turn_id is not None else {})


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        pytest.param([turn("a")], [turn("a"), turn("b")], ["b"], id="one more"),
        pytest.param([turn("a")], [turn("b"), turn("a")], ["b"], id="before the first one"),
        pytest.param([turn("ok")], [turn("ok"), turn("ok")], ["ok"], id="the same words twice"),
        pytest.param([turn("a"), turn("b")], [turn("a")], [], id="an older export"),
        pytest.param([turn("a")], [turn("a", sender="agent")], ["a"], id="said by the other side"),
        pytest.param([turn("a", at=AT)], [turn("a", at=AT), turn("a", at="2026-03-02T09:15:05Z")], ["a"], id="later"),
        pytest.param([turn("a", at=AT)], [turn("a", at="1772442845")], [], id="the same time in another form"),
        pytest.param([turn("a", sender="user")], [turn("<p>a</p>", sender="end-user")], [], id="other names, markup"),
        pytest.param([turn("a", 1)], [turn("edited", 1), turn("b", 2)], ["b"], id="edited, with an id"),
        pytest.param([turn("ok", 1)], [turn("ok", 1), turn("ok", 2)], ["ok"], id="the same words, other ids"),
        pytest.param([turn("a")], [turn("a", 1), turn("b", 2)], ["b"], id="ids in the newer export only"),
        pytest.param([turn("a", 1)], [turn("a"), turn("b")], ["b"], id="ids in the stored one only"),
        pytest.param([turn("a", 7)], [turn("b", 7), turn("c", 7)], ["b", "c"], id="an id that is not of the turn"),
        pytest.param(["a"], ["a", "b"], ["b"], id="turns that are no objects"),
    ],
)
def test_new_turns_are_found(before: list[Any], after: list[Any], added: list[str]) -> None:
    found = compared({"messages": before}, {"messages": after})
    assert found is not None
    assert [each["text"] if isinstance(each, dict) else each for each in found.added] == added
    assert found.shared == len(after) - len(added)


def test_documents_of_other_shapes_are_not_compared() -> None:
    assert compared({"text": "a"}, {"text": "b"}) is None
    assert compared({"messages": []}, {"tweets": []}) is None
