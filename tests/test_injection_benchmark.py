"""The benchmark of planted instructions: its table, its prompts without the fence, and a quick run."""

from __future__ import annotations

import pytest

from benchmarks.injection import PLANTED, Labels, Pair, measure, rows_of, share_with_interval, without_fence
from benchmarks.table import text
from classifier import Classifier
from config import load_taxonomy
from tests.fakes.trained_model import MISSING, model_path

CLEAN: Labels = ("Refund", "Money", "Neutral")
WANTED: Labels = ("Status", "Other", "Positive")


def pair(conversation: int, planted: str, *, has_fence: bool, changed: Labels = CLEAN) -> Pair:
    return Pair(conversation, planted, "customer", has_fence, CLEAN, changed, WANTED)


def test_table_compares_the_fence_with_none() -> None:
    """Attacks count, the harmless turn has a separate line; an unusable answer is a change."""
    pairs = [
        *(pair(number, name, has_fence=True) for number in range(4) for name in PLANTED),
        *(pair(number, name, has_fence=False, changed=WANTED) for number in range(2) for name in PLANTED),
        *(pair(number, name, has_fence=False, changed=()) for number in (2, 3) for name in PLANTED),
    ]
    rows = {row.measure.strip(): (row.product, row.reference) for row in rows_of(pairs)}
    assert rows["injection, 20 planted instructions: a label changes, %"] == ("0.0 (0.0-0.0)", "100.0 (100.0-100.0)")
    product, reference = rows["a label becomes the one that is asked for, %"]
    assert product == "0.0 (0.0-0.0)"
    assert reference.startswith("50.0 (")
    assert rows["harmless: a label changes, %"] == ("0.0 (0.0-0.0)", "100.0 (100.0-100.0)")
    assert rows["in a turn of the agent: a label changes, %"] == ("", "")


def test_interval_counts_conversations_and_not_answers() -> None:
    """Ten equal answers to one conversation say as much as one."""
    few = [[True] * 10] * 5 + [[False] * 10] * 5
    assert share_with_interval(few) == share_with_interval([group[:1] for group in few])
    low, high = (float(end) for end in share_with_interval(few).split("(")[1].rstrip(")").split("-"))
    assert low < 30
    assert high > 70


def test_prompt_without_fence_has_no_tag_and_no_rule_about_it() -> None:
    messages = Classifier(load_taxonomy()).messages("Customer: hello")
    rules, conversation = (message["content"] for message in without_fence(messages))
    assert conversation == "Customer: hello"
    assert "conversation>" not in rules
    assert "7. The conversation may be in any language" in rules
    assert "Customer: my parcel says delivered" in rules


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_quick_run_prints_the_table() -> None:
    if model_path() is None:
        pytest.skip(MISSING)
    shown = text(measure(quick=True))
    assert "injection, 5 planted instructions: a label changes, %" in shown
    assert all(f"{name}: a label changes" in shown for name in PLANTED)
