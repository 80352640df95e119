"""The probability of a label from the tokens of an answer: its arithmetic, its limits, and what it keeps silent about."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import aggregate_conversation
from classifier import Classifier, classification_flow
from config import load_taxonomy
from domain.confidence import label_confidence
from domain.conversation import Classification, Outcome, ResultOptions, build_result
from model_server.protocol import ChatReply, ChatTarget

TAXONOMY = load_taxonomy()
LABELS = {field: TAXONOMY.names(field) for field in ("intent", "topic", "sentiment")}
CLASSIFIER = Classifier(TAXONOMY)
CONVERSATION = aggregate_conversation({"text": "where is it?"})
LABELLED = Classification(
    categorization="Parcel is late.", intent="Order Status", topic="Account Access", sentiment="Neutral"
)
HEAD = '{"categorization":"Parcel is late.","intent":"'
MIDDLE, LATER, TAIL = '","topic":"', '","sentiment":"', '"}'
REPLY = f"{HEAD}Order Status{MIDDLE}Account Access{LATER}Neutral{TAIL}"

Entry = dict[str, Any]


class Client:
    """The part of a client that the flow needs."""

    target = ChatTarget("ollama_chat", "http://m/api/chat", "http://m", "llama3.2", None, 8192, "10m")


def token(text: str, weight: float = 0.5, others: Mapping[str, float] | None = None, **changes: Any) -> Entry:
    """A token of probability *weight* beside *others*; without others its list holds a word that fits nowhere."""
    listed = {text: weight, **({"zzz": 1e-9} if others is None else others)}
    ranked = sorted(listed.items(), key=lambda pair: -pair[1])
    return {**_piece(text, weight), "top_logprobs": [_piece(*pair) for pair in ranked], **changes}


def _piece(text: str, weight: float) -> Entry:
    return {"token": text, "logprob": math.log(weight), "bytes": list(text.encode())}


def sentiment_of(*tokens: Entry, reply: str = REPLY, label: str = "Neutral") -> float | None:
    """The confidence in the sentiment when *tokens* follow the first characters, and all else is certain."""
    before = reply[: reply.index(LATER)]
    start = before + LATER if not tokens[0]["token"].startswith(LATER[-1:]) else before + LATER[:-1]
    entries = [*certain(start), *tokens]
    written = "".join(entry["token"] for entry in entries)
    labelled = Classification(
        categorization="Parcel is late.", intent="Order Status", topic="Account Access", sentiment=label
    )
    found = label_confidence([*entries, *certain(reply[len(written) :])], reply, labelled, LABELS)
    return None if found is None else found["sentiment"]


def certain(text: str) -> list[Entry]:
    """Tokens of one character each, none of which leaves another choice."""
    return [token(character, 0.999, {}) | {"top_logprobs": [_piece("zzz", 1e-12)]} for character in text]


def test_the_share_among_the_allowed_labels() -> None:
    """Not the raw number: what no label begins with is left out."""
    assert sentiment_of(token("Neutral", 0.3, {"The": 0.5, "Negative": 0.1, "Positive": 0.1})) == 0.6


def test_several_tokens_multiply() -> None:
    """N or P, then eu or eg; what follows is settled, however unlikely the model thought it."""
    entries = [
        token("N", 0.6, {"P": 0.2, "x": 0.2}),
        token("eu", 0.3, {"eg": 0.1, "o": 0.6}),
        token("tral", 0.0001, {"tron": 0.99}),
    ]
    assert sentiment_of(*entries) == round(0.75 * 0.75, 4)


def test_a_settled_label_needs_no_alternatives() -> None:
    """Its further tokens may come without any."""
    entries = [token("Neu", 0.6, {"Neg": 0.1, "P": 0.1}), token("tral", 0.5, top_logprobs=[])]
    assert sentiment_of(*entries) == 0.75


def test_other_ways_to_write_the_same_label_count_for_it() -> None:
    """Neu and Neutral" are Neutral as well."""
    found = sentiment_of(token("Neut", 0.3, {"Neu": 0.2, 'Neutral"': 0.1, "Neg": 0.3, "Pos": 0.1}))
    assert found == 0.6


def test_tokens_that_leave_the_label_open_do_not_count() -> None:
    assert sentiment_of(token("Neutral", 0.3, {"N": 0.5, "Negative": 0.1, "P": 0.1})) == 0.6


def test_unlisted_label_has_the_weight_of_the_least_likely_token() -> None:
    """Positive is missing, and 0.01 is the least of the list."""
    assert sentiment_of(token("Neutral", 0.9, {"Negative": 0.09, "The": 0.01})) == 0.9


def test_an_unlisted_label_is_no_likelier_than_the_chosen_one() -> None:
    """Two others that might be as likely: a third is all that can be said."""
    entry = token("Neutral", 0.01)
    entry["top_logprobs"] = [_piece("The", 0.5), _piece("A", 0.3)]
    assert sentiment_of(entry) == 0.3333


def test_a_token_with_the_quote_and_the_beginning() -> None:
    """Its rivals are those with a quote; the quote alone leaves the label open."""
    entry = token('"Neu', 0.3, {'"': 0.4, '"Neg': 0.1, '"Pos': 0.1, '"x': 0.05, "Positive": 0.05})
    assert sentiment_of(entry) == 0.6


def test_a_token_with_the_end_and_what_follows() -> None:
    found = sentiment_of(token('Neutral"}', 0.3, {'Negative"}': 0.1, 'Positive"': 0.1, "Neutralized": 0.5}))
    assert found == 0.6


def test_label_that_is_a_prefix_of_another() -> None:
    """The closing quote is what decides."""
    labels = {**LABELS, "sentiment": ("Good", "Good Enough")}
    reply = REPLY.replace("Neutral", "Good")
    start = reply[: reply.index("Good") + 4]
    entries = [*certain(start), token('"', 0.6, {" Enough": 0.2, "!": 0.2}), *certain("}")]
    found = label_confidence(
        entries,
        reply,
        Classification(
            categorization="",
            intent="Order Status",
            topic="Account Access",
            sentiment="Good",
        ),
        labels,
    )
    assert found is not None
    assert found["sentiment"] == 0.75


def test_labels_outside_ascii_in_pieces_of_characters() -> None:
    """Tokens may be single bytes of a character; only the bytes tell."""
    labels = {"intent": ("Übel", "Öde"), "topic": ("Ä", "B"), "sentiment": ("Gut", "Schlecht")}
    reply = '{"categorization":"x","intent":"Übel","topic":"Ä","sentiment":"Gut"}'
    raw = reply.encode()
    at = raw.index("Übel".encode())
    second = {"token": "\ufffd", "bytes": [raw[at + 1]], "logprob": math.log(0.6)}
    rival = {"token": "\ufffd", "bytes": ["Ö".encode()[1]], "logprob": math.log(0.2)}
    entries = [{"token": "\ufffd", "bytes": [byte], "logprob": -0.1, "top_logprobs": [rival]} for byte in raw]
    entries[at + 1] = {**second, "top_logprobs": [second, rival]}
    found = label_confidence(
        entries,
        reply,
        Classification(
            categorization="x",
            intent="Übel",
            topic="Ä",
            sentiment="Gut",
        ),
        labels,
    )
    assert found is not None
    assert found["intent"] == 0.75


@pytest.mark.parametrize(
    ("around", "text"),
    [
        pytest.param(("```json\n", "\n```"), REPLY, id="fence-that-the-text-lacks"),
        pytest.param(("", "\n\n"), REPLY, id="white-space-that-the-text-lacks"),
        pytest.param((f"<think>{REPLY}, or</think>", ""), REPLY, id="the-same-in-the-thoughts"),
        pytest.param(("Sure: ", " Bye"), f"Sure: {REPLY} Bye", id="prose"),
        pytest.param(("", ""), f"  {REPLY}\n", id="white-space-that-the-tokens-lack"),
    ],
)
def test_tokens_around_the_answer(around: tuple[str, str], text: str) -> None:
    start = REPLY.index("Neutral")
    entries = [
        *certain(around[0] + REPLY[:start]),
        token("Neutral", 0.6, {"Negative": 0.3, "Positive": 0.1}),
        *certain(REPLY[start + 7 :] + around[1]),
    ]
    found = label_confidence(entries, text, LABELLED, LABELS)
    assert found is not None
    assert found["sentiment"] == 0.6


def test_keys_in_another_order_and_words_like_them() -> None:
    """The labels are found by their keys at the top of the object, not by how they look."""
    fields = {
        "other": {"sentiment": "Negative"},
        "sentiment": "Neutral",
        "categorization": '"sentiment": "Positive"',
        "topic": "Other",
        "intent": "Other",
    }
    reply = json.dumps(fields, indent=2)
    start = reply.index("Neutral")
    entries = [
        *certain(reply[:start]),
        token("Neutral", 0.6, {"Negative": 0.3, "Positive": 0.1}),
        *certain(reply[start + 7 :]),
    ]
    found = label_confidence(
        entries,
        reply,
        Classification(
            categorization="x",
            intent="Other",
            topic="Other",
            sentiment="Neutral",
        ),
        LABELS,
    )
    assert found is not None
    assert found["sentiment"] == 0.6


GOOD = certain(REPLY)


@pytest.mark.parametrize(
    ("tokens", "reply", "labelled"),
    [
        pytest.param([], REPLY, LABELLED, id="no-tokens"),
        pytest.param(certain(REPLY[:-9]), REPLY, LABELLED, id="tokens-end-early"),
        pytest.param(certain(REPLY.replace("Neutral", "neutral")), REPLY, LABELLED, id="tokens-of-another-text"),
        pytest.param(
            certain(REPLY.replace("Neutral", "neutral")), REPLY.replace("Neutral", "neutral"), LABELLED, id="spelling"
        ),
        pytest.param(certain(f"{REPLY} {REPLY}x"), f"{REPLY}!", LABELLED, id="twice-and-neither-is-it"),
        pytest.param(
            GOOD,
            REPLY,
            Classification(
                categorization="x",
                intent="Complaint",
                topic="Account Access",
                sentiment="Neutral",
            ),
            id="another-label",
        ),
        pytest.param([{**entry, "top_logprobs": None} for entry in GOOD], REPLY, LABELLED, id="no-alternatives"),
        pytest.param([{**entry, "top_logprobs": []} for entry in GOOD], REPLY, LABELLED, id="empty-alternatives"),
        pytest.param([{**entry, "logprob": None} for entry in GOOD], REPLY, LABELLED, id="no-number"),
        pytest.param([{**entry, "logprob": math.nan} for entry in GOOD], REPLY, LABELLED, id="nan"),
        pytest.param([{**entry, "logprob": 3.0} for entry in GOOD], REPLY, LABELLED, id="above-certain"),
        pytest.param([{**entry, "logprob": -9999.0} for entry in GOOD], REPLY, LABELLED, id="not-known-to-openai"),
        pytest.param([{**entry, "bytes": [300]} for entry in GOOD], REPLY, LABELLED, id="no-bytes"),
        pytest.param([*GOOD, "x"], REPLY, LABELLED, id="no-object"),
    ],
)
def test_unclear_tokens_give_no_confidence(tokens: list[Any], reply: str, labelled: Classification) -> None:
    assert label_confidence(GOOD, REPLY, LABELLED, LABELS) is not None
    assert label_confidence(tokens, reply, labelled, LABELS) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
numbers = st.floats() | st.integers() | st.none() | st.booleans()
pieces = st.text(max_size=6) | st.sampled_from(["Neu", '"Neg', 'Order Status"', "A", "", "\ud83d", *REPLY])
alternatives = st.fixed_dictionaries(
    {"token": pieces, "logprob": numbers}, optional={"bytes": st.none() | st.lists(st.integers(-1, 300), max_size=4)}
)
entries_like = st.fixed_dictionaries(
    {"token": pieces, "logprob": numbers, "top_logprobs": st.lists(alternatives | json_values, max_size=4)}
)


@given(st.lists(entries_like | json_values, max_size=12), st.text(max_size=40) | st.just(REPLY))
def test_odd_tokens_never_raise(tokens: list[Any], reply: str) -> None:
    label_confidence(tokens, reply, LABELLED, LABELS)


@given(st.data())
def test_any_tokenization_gives_probabilities(data: st.DataObject) -> None:
    """Whatever the tokenizer and the alternatives: nothing, or numbers from 0 to 1."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(REPLY) - 1), max_size=30)))
    tokens = []
    for start, end in zip([0, *cuts], [*cuts, len(REPLY)], strict=True):
        listed = data.draw(st.lists(alternatives, max_size=4))
        weight = data.draw(st.floats(-40, 0))
        tokens.append({"token": REPLY[start:end], "logprob": weight, "top_logprobs": listed})
    found = label_confidence(tokens, REPLY, LABELLED, LABELS)
    assert found is None or (found.keys() == LABELS.keys() and all(0 <= value <= 1 for value in found.values()))


@given(st.text(alphabet='{}[]",:\\ aintent', max_size=60))
def test_odd_replies_never_raise(reply: str) -> None:
    label_confidence(certain(reply), reply, LABELLED, LABELS)


@pytest.mark.parametrize(("review_below", "expected"), [(0.6, False), (0.61, True), (0.0, False), (None, None)])
def test_least_certain_label_decides_about_review(review_below: float | None, expected: bool | None) -> None:
    document = {"_id": 1, "text": "Where is my parcel?"}
    confidence = {"intent": 0.9, "topic": 0.6, "sentiment": 0.99}
    outcome = Outcome(LABELLED, "model", None, "", "", confidence=confidence)
    options = ResultOptions(review_below=review_below)
    result = build_result(document, aggregate_conversation(document), outcome, "job", options)
    assert result["processing_metadata"].get("needs_review") is expected


@pytest.mark.parametrize(("second", "expected"), [("2024-05-01", None), ("yesterday", "listed"), (None, "listed")])
def test_result_says_if_the_order_of_turns_is_unknown(second: str | None, expected: str | None) -> None:
    messages = [{"sender": "customer", "text": "a", "timestamp": time} for time in ("2024-05-01", second)]
    conversation = aggregate_conversation({"messages": messages})
    result = build_result({}, conversation, Outcome(LABELLED, "model", None, "", ""), "job", ResultOptions())
    assert result["processing_metadata"].get("turn_order") == expected


def test_labels_in_reasoning_do_not_count() -> None:
    """The draft has the labels of the answer, with other probabilities."""
    flow = classification_flow(CONVERSATION, Client(), CLASSIFIER)
    next(flow)
    reply = f"<think>{REPLY}</think>{REPLY}"
    with pytest.raises(StopIteration) as finished:
        flow.send(ChatReply(reply, None, None, tokens=(*certain(f"<think>{REPLY}</think>"), *GOOD)))
    assert finished.value.value.confidence == label_confidence(GOOD, REPLY, LABELLED, LABELS)


def test_the_answer_to_a_repair_turn_counts() -> None:
    """Not the tokens of the unusable first reply."""
    start = REPLY.index("Neutral")
    wrong, right = (
        (*certain(REPLY[:start]), token("Neutral", share, {"Negative": 1 - share}), *certain(REPLY[start + 7 :]))
        for share in (0.1, 0.8)
    )
    flow = classification_flow(CONVERSATION, Client(), CLASSIFIER)
    next(flow)
    flow.send(ChatReply(REPLY.replace('"Account Access"', "7"), None, None, tokens=wrong))
    with pytest.raises(StopIteration) as finished:
        flow.send(ChatReply(REPLY, None, None, tokens=right))
    answer = finished.value.value
    assert (answer.attempts, answer.confidence["sentiment"]) == (2, round(0.8 / 1.2, 4))


def test_no_tokens_give_no_confidence() -> None:
    flow = classification_flow(CONVERSATION, Client(), CLASSIFIER)
    next(flow)
    with pytest.raises(StopIteration) as finished:
        flow.send(ChatReply(REPLY, None, None))
    assert finished.value.value.confidence is None
