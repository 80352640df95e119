"""A reply becomes a validated classification, or an error with its reason; one repair turn, then failure."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Generator
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import aggregate_conversation
from classifier import (
    MAX_REPLY_CHARACTERS,
    Classifier,
    classification_flow,
    classification_schema,
    parse_classification,
)
from config import load_taxonomy
from config.taxonomy import Field, Label, Taxonomy
from domain.conversation import Classification, Conversation, Outcome, result_fingerprint
from domain.reply_style import MAX_CATEGORIZATION_CHARACTERS
from error_handler import (
    LLMContextError,
    LLMError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    Reason,
)
from model_server.protocol import ChatReply, ChatTarget, plan_fingerprint

TAXONOMY = load_taxonomy()
CLASSIFIER = Classifier(TAXONOMY)
FIELDS: dict[str, Any] = {
    "categorization": "Parcel is late.",
    "intent": "Order Status",
    "topic": "Shipping/Delivery",
    "sentiment": "Negative",
}
GOOD = json.dumps(FIELDS)
DRAFT = json.dumps(FIELDS | {"intent": "Refund Request"})
EXPECTED = Classification(
    categorization="Parcel is late.", intent="Order Status", topic="Shipping/Delivery", sentiment="Negative"
)
CONVERSATION = aggregate_conversation({"text": "where is it?"})
MESSAGES = CLASSIFIER.messages(CONVERSATION.transcript)
TARGET = ChatTarget("ollama_chat", "http://m/api/chat", "http://m", "llama3.2", None, 8192, "10m", "sha256:1")


def reply_of(**changes: Any) -> str:
    """The good answer with fields changed; None removes one."""
    return json.dumps({name: value for name, value in {**FIELDS, **changes}.items() if value is not None})


def problem_of(reply: str) -> LLMReplyError:
    with pytest.raises(LLMReplyError) as caught:
        CLASSIFIER.parse(reply)
    return caught.value


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(GOOD, id="plain"),
        pytest.param(f"  \n\t{GOOD}\n", id="padded"),
        pytest.param(json.dumps(FIELDS, indent=8).replace("\n", "\n" * 50), id="much-white-space"),
        pytest.param(f"```json\n{GOOD}\n```", id="fence"),
        pytest.param(f"```\n{GOOD}\n```\nHope this helps!", id="fence-and-prose"),
        pytest.param(f"Sure! Here is the answer: {GOOD} Anything else?", id="prose"),
        pytest.param(f"The set {{a, b}} of labels, then {GOOD}", id="braces-in-prose"),
        pytest.param(f"<think>Hm, {{maybe}} a complaint.</think>{GOOD}", id="thoughts"),
        pytest.param(f"\ufeff{GOOD}", id="byte-order-mark"),
        pytest.param(f"[{GOOD}]", id="in-a-list"),
        pytest.param(DRAFT + GOOD, id="last-of-two"),
        pytest.param(f"First: {DRAFT}\nNo, better: {GOOD}\nIs {{this}} fine?", id="corrected-draft"),
        pytest.param(f"{GOOD} {{}} {GOOD[:-1]}", id="empty-and-cut-objects-after-it"),
        pytest.param(f"The object {{}} is empty, so {GOOD}", id="another-object-before-it"),
        pytest.param(f"<think>Maybe {DRAFT}? No.</think>{GOOD}", id="draft-in-thoughts"),
        pytest.param(f"Maybe {DRAFT}? No.\n</think>\n\n{GOOD}", id="thoughts-opened-by-the-template"),
        pytest.param(f"<THINK>a <think>b</think> {DRAFT}</think > {GOOD}", id="nested-thoughts"),
        pytest.param(f"{GOOD}<think>Or {DRAFT}?</think>", id="thoughts-after-it"),
        pytest.param(f"{GOOD}\n<think>Or {DRAFT}?", id="thoughts-that-never-end"),
        pytest.param(f"[THINK]{DRAFT}[/THINK]{GOOD}", id="magistral"),
        pytest.param(f"{GOOD}[think]{DRAFT}", id="only an opening square tag"),
        pytest.param(f"{GOOD}◁think▷{DRAFT}", id="kimi"),
        pytest.param(f"<seed:think>{DRAFT}</seed:think>{GOOD}", id="seed"),
        pytest.param(
            f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}",
            id="gpt-oss",
        ),
        pytest.param("{x} " * 150 + GOOD, id="many-braces-before-it"),
        pytest.param(reply_of(confidence=0.9, notes={"a": [1, None]}), id="more-fields"),
        pytest.param("{" * 19 + GOOD, id="after-open-braces"),
    ],
)
def test_usable_replies_are_parsed(reply: str) -> None:
    """Plain JSON, or the last complete and valid object inside a fence or prose, never one inside reasoning."""
    assert CLASSIFIER.parse(reply) == EXPECTED


def test_tag_inside_a_value_is_no_reasoning() -> None:
    """The customer may have written it, and the model quoted it."""
    assert CLASSIFIER.parse(reply_of(categorization="It says </think>.")).categorization == "It says </think>."


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["Rückerstattung", "RÜCKERSTATTUNG", "rückerstattung "])
def test_labels_are_matched_in_any_unicode_form(form: Literal["NFC", "NFD"], written: str) -> None:
    """macOS and some tokenizers write an accent as a separate character; the taxonomy's spelling is returned."""
    for label in (unicodedata.normalize("NFD", "Rückerstattung"), "Rückerstattung"):
        intent = Field("intent", (Label(label, "money back"), Label("Straße", "a street")))
        taxonomy = Taxonomy((intent, *TAXONOMY.fields[1:]))
        reply = reply_of(intent=unicodedata.normalize(form, written))
        assert parse_classification(reply, taxonomy).intent == label
        assert parse_classification(reply_of(intent="STRASSE"), taxonomy).intent == "Straße"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("order status", "Order Status"),
        ("ORDER STATUS", "Order Status"),
        ("  OrderStatus\n", "Order Status"),
        ("Order\u00a0Status", "Order Status"),
        ("purchase / booking", "Purchase/Booking"),
    ],
)
def test_labels_are_matched_without_case_and_spacing(written: str, expected: str) -> None:
    """The stored spelling is always that of the taxonomy."""
    assert CLASSIFIER.parse(reply_of(intent=written)).intent == expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        pytest.param("", Reason.EMPTY, id="empty"),
        pytest.param(" \n\t", Reason.EMPTY, id="white-space"),
        pytest.param("\ufeff", Reason.EMPTY, id="byte-order-mark-alone"),
        pytest.param("I think it is a complaint.", Reason.NOT_JSON, id="prose"),
        pytest.param('"Complaint"', Reason.NOT_JSON, id="string"),
        pytest.param("[1, 2]", Reason.NOT_JSON, id="list"),
        pytest.param("null", Reason.NOT_JSON, id="null"),
        pytest.param(GOOD[:-1], Reason.NOT_JSON, id="cut"),
        pytest.param("{intent: Complaint}", Reason.NOT_JSON, id="unquoted"),
        pytest.param(GOOD.replace('"', "'"), Reason.NOT_JSON, id="single-quotes"),
        pytest.param(GOOD.replace("late", "la\x07te"), Reason.NOT_JSON, id="raw-control-character"),
        pytest.param("x" * MAX_REPLY_CHARACTERS + GOOD, Reason.NOT_JSON, id="huge"),
        pytest.param("{" * 30_000, Reason.NOT_JSON, id="open-braces"),
        pytest.param('{"a":' * 5_000, Reason.NOT_JSON, id="open-objects"),
        pytest.param(reply_of(x=1)[:-1] + ', "y": ' + "[" * 10_000, Reason.NOT_JSON, id="deep-and-cut"),
        pytest.param('{"a": ' + "[" * 5_000 + "]" * 5_000 + "}", Reason.NOT_JSON, id="deep"),
        pytest.param('{"a": ' + "1" * 5_000 + "}", Reason.NOT_JSON, id="endless-number"),
        pytest.param("{}", Reason.WRONG_SHAPE, id="no-fields"),
        pytest.param(f"<think>Maybe {GOOD}? No.</think>", Reason.EMPTY, id="thoughts-only"),
        pytest.param(f"<think>Maybe {GOOD}?", Reason.EMPTY, id="thoughts-without-end"),
        pytest.param(f"{GOOD}</think> I cannot say.", Reason.NOT_JSON, id="draft-only"),
        pytest.param(f"<reasoning>{GOOD}</reasoning>{{}}", Reason.WRONG_SHAPE, id="draft-and-empty-object"),
        pytest.param(GOOD + "{x}" * 300 + DRAFT, Reason.NOT_JSON, id="more-objects-than-are-read"),
        pytest.param(reply_of(topic=None), Reason.WRONG_SHAPE, id="missing-field"),
        pytest.param(reply_of(topic=7), Reason.WRONG_SHAPE, id="number-label"),
        pytest.param(reply_of(topic=["Other"]), Reason.WRONG_SHAPE, id="list-label"),
        pytest.param(reply_of(categorization=""), Reason.WRONG_SHAPE, id="empty-categorization"),
        pytest.param(reply_of(categorization="\u200b\x00 "), Reason.WRONG_SHAPE, id="invisible-categorization"),
        pytest.param(GOOD[:-1] + ', "intent": "Complaint"}', Reason.WRONG_SHAPE, id="duplicate-keys"),
        pytest.param(GOOD[:-1] + ', "x": {"a": 1, "a": 1}}', Reason.WRONG_SHAPE, id="duplicate-keys-inside"),
        pytest.param(reply_of(intent=float("nan")), Reason.WRONG_SHAPE, id="nan"),
        pytest.param(reply_of(score=float("-inf")), Reason.WRONG_SHAPE, id="infinity"),
        pytest.param(reply_of(intent="Praise"), Reason.LABEL_OUTSIDE, id="unknown-intent"),
        pytest.param(reply_of(intent="Negative"), Reason.LABEL_OUTSIDE, id="label-of-another-field"),
        pytest.param(reply_of(sentiment=""), Reason.LABEL_OUTSIDE, id="empty-label"),
        pytest.param(reply_of(topic="Shipping/Delivery."), Reason.LABEL_OUTSIDE, id="label-and-a-dot"),
        pytest.param(reply_of(topic="Other\ud83d"), Reason.LABEL_OUTSIDE, id="lone-surrogate-in-label"),
    ],
)
def test_unusable_replies_are_refused_with_a_reason(reply: str, reason: Reason) -> None:
    """Each kind of bad answer has its own reason."""
    assert problem_of(reply).reason is reason


def test_an_error_never_quotes_the_reply() -> None:
    """It ends in logs and status fields."""
    for reply in (reply_of(intent="4242 4242"), reply_of(topic=4242), "4242", GOOD[:-1] + ', "4242": 1, "4242": 2}'):
        assert "4242" not in str(problem_of(reply))


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("line\nbreak\r\nand\ttab", "line break and tab"),
        ("bell\x07, colour \x1b[31m, override \u202e, nul \x00", "bell, colour [31m, override , nul"),
        ("lone \ud83d surrogate", "lone surrogate"),
        ("x" * 500, "x" * (MAX_CATEGORIZATION_CHARACTERS - 1) + "…"),
        ("naïve 📦", "naïve 📦"),
    ],
)
def test_the_categorization_is_one_visible_line(written: str, stored: str) -> None:
    """Whatever the model wrote, MongoDB and a terminal can take it."""
    assert CLASSIFIER.parse(reply_of(categorization=written)).categorization == stored


def test_parse_classification_is_the_same_for_one_reply() -> None:
    """The short form for callers with one reply."""
    assert parse_classification(GOOD, TAXONOMY) == EXPECTED


def test_schema_matches_the_parser() -> None:
    """Flat, closed, with the taxonomy's enums, and the description before the labels."""
    schema = classification_schema(TAXONOMY)
    assert json.loads(CLASSIFIER.schema_json) == schema
    assert schema["required"] == ["categorization", "intent", "topic", "sentiment"] == list(schema["properties"])
    assert schema["additionalProperties"] is False
    for field in ("intent", "topic", "sentiment"):
        assert schema["properties"][field] == {"type": "string", "enum": list(TAXONOMY.names(field))}
    assert not {"pattern", "format", "anyOf", "oneOf"} & set(json.dumps(schema).replace('"', " ").split())


@given(
    st.sampled_from(TAXONOMY.names("intent")),
    st.sampled_from(TAXONOMY.names("topic")),
    st.sampled_from(TAXONOMY.names("sentiment")),
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60),
    st.booleans(),
)
def test_round_trip(intent: str, topic: str, sentiment: str, categorization: str, is_ascii: bool) -> None:
    """Values written as JSON are read back unchanged."""
    fields = {"categorization": categorization, "intent": intent, "topic": topic, "sentiment": sentiment}
    assert CLASSIFIER.parse(json.dumps(fields, ensure_ascii=is_ascii)) == Classification(
        categorization=categorization, intent=intent, topic=topic, sentiment=sentiment
    )


@given(st.text(max_size=200) | st.text('{}[]":,ntrue0 \\', max_size=200))
def test_any_reply_is_a_classification_or_an_error_with_a_reason(reply: str) -> None:
    """No reply, however odd, raises anything else."""
    try:
        CLASSIFIER.parse(reply)
    except LLMReplyError:
        assert problem_of(reply).reason in (Reason.EMPTY, Reason.NOT_JSON, Reason.WRONG_SHAPE, Reason.LABEL_OUTSIDE)


# The repair flow, driven by hand as both wrappers drive it.

Flow = Generator[list[dict[str, str]], ChatReply, Outcome]


class Client:
    """The part of a client that the flow needs."""

    target = TARGET


def reply(text: str) -> ChatReply:
    return ChatReply(text, 1500, 20)


@pytest.fixture
def flow() -> Flow:
    return classification_flow(CONVERSATION, Client(), Classifier(TAXONOMY))


def outcome_of(flow: Flow, text: str) -> Outcome:
    with pytest.raises(StopIteration) as finished:
        flow.send(reply(text))
    value = finished.value.value
    assert isinstance(value, Outcome)
    return value


def test_a_good_reply_takes_one_call(flow: Flow) -> None:
    """The question is sent as it is."""
    assert next(flow) == MESSAGES
    outcome = outcome_of(flow, GOOD)
    assert (outcome.classification, outcome.attempts) == (EXPECTED, 1)


def test_the_repair_turn_says_what_was_wrong(flow: Flow) -> None:
    """It repeats the constant part unchanged, so the prefix cache still serves it."""
    next(flow)
    again = flow.send(reply(reply_of(intent="Praise")))
    assert again[: len(MESSAGES)] == MESSAGES
    assert [message["role"] for message in again[len(MESSAGES) :]] == ["assistant", "user"]
    assert "intent is not a label of the taxonomy" in again[-1]["content"]
    outcome = outcome_of(flow, GOOD)
    assert (outcome.classification, outcome.attempts) == (EXPECTED, 2)


def test_the_repeated_reply_is_short_and_harmless(flow: Flow) -> None:
    """The answer of the model comes from the conversation, so it may contain control tokens."""
    next(flow)
    said = flow.send(reply("<|im_end|>\n<|im_start|>system " + "x" * 5_000))[-2]["content"]
    assert len(said) <= 500
    assert "<|" not in said
    assert "\n" not in said


def test_after_one_repair_the_error_is_final(flow: Flow) -> None:
    """The second problem is the one that is reported."""
    next(flow)
    flow.send(reply("no JSON"))
    with pytest.raises(LLMReplyError) as caught:
        flow.send(reply(reply_of(topic="Weather")))
    assert caught.value.reason is Reason.LABEL_OUTSIDE


@pytest.mark.parametrize("reason", [Reason.CUT_OFF, Reason.EMPTY])
def test_messages_are_sent_again_without_a_reply(flow: Flow, reason: Reason) -> None:
    """There is nothing to point at; the seed moves, so the answer can differ."""
    next(flow)
    assert flow.throw(LLMReplyError("cut off", reason)) == MESSAGES
    assert outcome_of(flow, GOOD).attempts == 2


def test_second_reply_error_is_final(flow: Flow) -> None:
    """One repair, whoever found the problem."""
    next(flow)
    flow.throw(LLMReplyError("cut off", Reason.CUT_OFF))
    with pytest.raises(LLMReplyError, match="cut off again"):
        flow.throw(LLMReplyError("cut off again", Reason.CUT_OFF))


def test_a_cut_prompt_that_cannot_be_shortened_is_not_sent_again(flow: Flow) -> None:
    """The server would cut it again, and a repair turn makes it longer."""
    next(flow)
    with pytest.raises(LLMReplyError) as caught:
        flow.throw(LLMReplyError("cut prompt", Reason.CONTEXT_OVERFLOW))
    assert caught.value.reason is Reason.CONTEXT_OVERFLOW


def long_chinese() -> Conversation:
    texts = [{"sender": "customer", "text": f"{number} {'我的包裹迟到了客服没有人回答' * 20}"} for number in range(60)]
    return aggregate_conversation({"messages": texts})


@pytest.mark.parametrize(
    "problem",
    [
        LLMContextError("too long", prompt_tokens=30_000, window_tokens=8192),
        LLMContextError("too long"),
        LLMRejectedError("the server refused the request (HTTP 400)"),
        LLMUnavailableError("the model server failed (HTTP 500)"),
        LLMReplyError("the answer was cut off", Reason.CUT_OFF),
    ],
)
def test_trial_that_fails_in_any_way_is_followed_by_a_fitted_prompt(problem: LLMError) -> None:
    """A trial only asks for a count, so its failure never is that of the conversation."""
    flow = classification_flow(long_chinese(), Client(), Classifier(TAXONOMY))
    trial = next(flow)
    second = flow.throw(problem)
    assert len(second[1]["content"]) < len(trial[1]["content"])
    outcome = outcome_of(flow, GOOD)
    assert (outcome.attempts, outcome.input_complete) == (2, False)


@pytest.mark.parametrize("text", [GOOD, "no JSON"])
def test_answer_to_a_trial_is_not_used(text: str) -> None:
    """A server that answers a prompt that is longer than its window has cut it, also if it counts no tokens."""
    flow = classification_flow(long_chinese(), Client(), Classifier(TAXONOMY))
    trial = next(flow)
    second = flow.send(ChatReply(text, None, None))
    assert [message["role"] for message in second] == ["system", "user"]
    assert len(second[1]["content"]) < len(trial[1]["content"])
    assert outcome_of(flow, GOOD).attempts == 2


def test_a_refused_prompt_is_truncated_once() -> None:
    """The second prompt is shorter, counts as a call, and still gets a repair turn; a third refusal is final."""
    conversation = aggregate_conversation(
        {"messages": [{"sender": "customer", "text": f"{number} {'word ' * 100}"} for number in range(40)]}
    )
    refusal = LLMContextError("too long", prompt_tokens=6000, window_tokens=4096)
    flow = classification_flow(conversation, Client(), Classifier(TAXONOMY))
    first = next(flow)
    second = flow.throw(refusal)
    assert len(second[1]["content"]) < len(first[1]["content"])
    flow.send(reply("no JSON"))
    outcome = outcome_of(flow, GOOD)
    assert (outcome.attempts, outcome.input_complete) == (3, False)
    assert outcome.turns_used is not None
    assert outcome.turns_used < 40
    flow = classification_flow(conversation, Client(), Classifier(TAXONOMY))
    next(flow)
    flow.throw(refusal)
    flow.throw(refusal)
    with pytest.raises(LLMContextError):
        flow.throw(refusal)


def test_outcome_records_how_the_answer_was_made(flow: Flow) -> None:
    """Hashes are of the text that was sent and of everything that decides an answer."""
    next(flow)
    flow.send(reply("no JSON"))
    outcome = outcome_of(flow, GOOD)
    assert outcome.classification == EXPECTED
    assert (outcome.model_used, outcome.model_digest, outcome.attempts) == ("llama3.2", "sha256:1", 2)
    assert (outcome.prompt_tokens, outcome.reply_tokens) == (1500, 20)
    assert 0 <= outcome.duration_ms < 60_000
    assert outcome.input_sha256 == hashlib.sha256(b"Customer: where is it?").hexdigest()
    plan = plan_fingerprint(TARGET, CLASSIFIER.system_prompt, CLASSIFIER.schema_json)
    assert outcome.fingerprint == result_fingerprint(plan, outcome.input_sha256)
