"""The built-in baseline: what it looks at, what it falls back to, and that hostile text does not stop it."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import aggregate_conversation
from config.taxonomy import Field, Label, Taxonomy, load_taxonomy
from domain.conversation import Conversation, Sender, Turn
from embedded.baseline import BaselineClassifier
from error_handler import ConfigurationError
from tests.fakes.fake_ollama import INTENTS, SENTIMENTS, TOPICS

SHIPPED = load_taxonomy()
BASELINE = BaselineClassifier(SHIPPED)


def conversation(*turns: tuple[Sender, str]) -> Conversation:
    return Conversation("messages", None, tuple(Turn(sender, text) for sender, text in turns), len(turns))


def classified(text: str) -> tuple[str, str, str]:
    answer = BASELINE.classify(conversation(("customer", text)))
    return answer.intent, answer.topic, answer.sentiment


def own_taxonomy(intents: dict[str, list[str]], sentiments: tuple[str, ...] = SENTIMENTS) -> Taxonomy:
    labels = tuple(Label(name, f"{name}.", tuple(phrases)) for name, phrases in intents.items())
    topics = (Label("Everything", "Everything."),)
    feelings = tuple(Label(name, "") for name in sentiments)
    return Taxonomy((Field("intent", labels), Field("topic", topics), Field("sentiment", feelings)))


def test_phrases_match_in_any_unicode_form() -> None:
    """A combining accent would split a word."""
    for form in ("NFC", "NFD"):
        own = BaselineClassifier(
            own_taxonomy({"Rückerstattung": [unicodedata.normalize(form, "geld zurück")], "Other": []})
        )
        for text in ("Ich will mein Geld zurück!", unicodedata.normalize("NFD", "Ich will mein GELD ZURÜCK!")):
            assert own.classify(conversation(("customer", text))).intent == "Rückerstattung"


class TestShippedTaxonomy:
    def test_labels_are_the_documented_ones_in_order(self) -> None:
        assert SHIPPED.names("intent") == INTENTS
        assert SHIPPED.names("topic") == TOPICS
        assert SHIPPED.names("sentiment") == SENTIMENTS

    def test_definitions_fit_one_line(self) -> None:
        assert [
            label for label in chain(SHIPPED.labels("intent"), SHIPPED.labels("topic")) if len(label.definition) > 140
        ] == []

    @pytest.mark.parametrize("field", ["intent", "topic"])
    def test_each_phrase_alone_finds_its_own_label(self, field: str) -> None:
        """So none is listed under two labels, and none is made of ignored words only."""
        wrong = []
        for label in SHIPPED.labels(field):
            for phrase in label.phrases:
                answer = BASELINE.classify(conversation(("customer", phrase)))
                if getattr(answer, field) != label.name:
                    wrong.append((label.name, phrase))
        assert wrong == []

    def test_each_label_but_other_has_phrases(self) -> None:
        assert {
            label.name for label in chain(SHIPPED.labels("intent"), SHIPPED.labels("topic")) if len(label.phrases) < 20
        } == {"Other"}


@pytest.mark.parametrize(
    ("text", "intent", "topic"),
    [
        ("Where is my parcel? The tracking number shows nothing.", "Order Status", "Shipping/Delivery"),
        ("I want my money back, the kettle arrived broken.", "Refund Request", "Returns/Refunds"),
        ("You charged me twice on this month's bill!", "Billing Dispute", "Account/Billing"),
        ("Forgot my password and now I'm locked out", "Account Access", "Account Access"),
        ("please cancel my subscription", "Cancellation", "Subscription/Plan"),
        ("The app keeps crashing with an error message.", "Technical Support", "Technical Issue"),
        ("My debit card was stolen, please block my card", "Security/Fraud/Loss", "Banking/Cards"),
        ("I'd like to book a table for four", "Purchase/Booking", "Travel Booking"),
        ("Shout out to the staff, amazing customer service", "Feedback/Praise", "Service Quality"),
    ],
)
def test_plain_requests_get_the_expected_label(text: str, intent: str, topic: str) -> None:
    assert classified(text)[:2] == (intent, topic)


@pytest.mark.parametrize(
    ("text", "sentiment"),
    [
        ("This is wonderful, I love it, great work!", "Positive"),
        ("Horrible. I am disgusted and very angry.", "Negative"),
        ("Could you please help me to change the address? Thanks", "Neutral"),
        ("The order number is 4711.", "Neutral"),
    ],
)
def test_sentiment_of_plain_texts(text: str, sentiment: str) -> None:
    assert classified(text)[2] == sentiment


class TestWhoSaidIt:
    @pytest.mark.parametrize("sender", ["agent", "unknown"])
    @pytest.mark.parametrize(
        "feeling", ["I love this, wonderful, great, best day!", "Horrible, disgusting, I hate it!"]
    )
    def test_sentiment_is_the_customers_alone(self, sender: Sender, feeling: str) -> None:
        answer = BASELINE.classify(conversation(("customer", "The box is blue."), (sender, feeling)))
        assert answer.sentiment == "Neutral"

    def test_intent_is_the_customers_alone_but_the_agent_may_name_the_topic(self) -> None:
        answer = BASELINE.classify(
            conversation(("customer", "hello there"), ("agent", "Do you want to cancel your subscription?"))
        )
        assert (answer.intent, answer.topic) == ("Other", "Subscription/Plan")

    def test_the_first_message_outweighs_a_later_one(self) -> None:
        turns: list[tuple[Sender, str]] = [("customer", "cancel my order"), ("customer", "reset my password")]
        assert BASELINE.classify(conversation(*turns)).intent == "Cancellation"
        assert BASELINE.classify(conversation(*reversed(turns))).intent == "Account Access"

    def test_plain_answers_do_not_dilute_what_was_felt(self) -> None:
        plain: list[tuple[Sender, str]] = [("customer", "blue box")] * 30
        assert BASELINE.classify(conversation(("customer", "This is a horrible mess"), *plain)).sentiment == "Negative"


class TestFallback:
    @pytest.mark.parametrize("text", ["xyzzy plugh", "!!! ??? ...", "@refund https://example.com/refund"])
    def test_nothing_found_is_other(self, text: str) -> None:
        assert classified(text)[:2] == ("Other", "Other")

    def test_equally_strong_labels_are_other(self) -> None:
        baseline = BaselineClassifier(own_taxonomy({"A": ["apple"], " oTHer ": [], "B": ["banana"]}))
        assert baseline.classify(conversation(("customer", "apple banana"))).intent == " oTHer "

    def test_without_other_the_last_label_stands_in(self) -> None:
        baseline = BaselineClassifier(own_taxonomy({"A": ["apple"], "B": ["banana"]}))
        assert baseline.classify(conversation(("customer", "cherry"))).intent == "B"

    def test_labels_without_phrases_are_all_the_fallback(self) -> None:
        assert BASELINE.classify(conversation(("customer", "hello"))).topic == "Other"
        assert BaselineClassifier(own_taxonomy({"A": []})).classify(conversation(("customer", "hello"))).intent == "A"


class TestMatching:
    def test_own_taxonomy_file_in_another_language(self, tmp_path: Path) -> None:
        path = tmp_path / "labels.yaml"
        path.write_text(
            "intents:\n"
            "  Kündigung: {definition: Will kündigen., phrases: [kündigen, Vertrag beenden]}\n"
            "  Sonstiges: {definition: Alles andere.}\n"
            "topics:\n"
            "  Strom: {definition: Strom., phrases: [Stromtarif]}\n"
            "  Gas: {definition: Gas.}\n"
            "sentiments: [negative, NEUTRAL, Positive]\n",
            encoding="utf-8",
        )
        baseline = BaselineClassifier(load_taxonomy(path))
        answer = baseline.classify(conversation(("customer", "Ich möchte KÜNDIGEN, den Stromtarif!")))
        assert answer.as_dict() == {
            "intent": "Kündigung",
            "topic": "Strom",
            "sentiment": "NEUTRAL",
            "categorization": "Baseline: Kündigung about Strom",
        }

    @pytest.mark.parametrize("text", ["CANCEL the order!", "cancel:\norder", "Cancel\u00a0my\torder", "cancel-order"])
    def test_case_spacing_punctuation_and_articles_do_not_matter(self, text: str) -> None:
        baseline = BaselineClassifier(own_taxonomy({"Cancel": ["cancel my order"], "Other": []}))
        assert baseline.classify(conversation(("customer", text))).intent == "Cancel"

    @pytest.mark.parametrize("text", ["cancelled my order", "recancel my order", "cancel my orders"])
    def test_only_whole_words_match(self, text: str) -> None:
        baseline = BaselineClassifier(own_taxonomy({"Cancel": ["cancel my order"], "Other": []}))
        assert baseline.classify(conversation(("customer", text))).intent == "Other"

    def test_the_longer_phrase_wins_over_the_word_inside_it(self) -> None:
        assert classified("What is your refund policy?")[0] == "Information Request"

    def test_repeating_a_phrase_wins_nothing(self) -> None:
        baseline = BaselineClassifier(own_taxonomy({"A": ["apple"], "B": ["banana split"], "Other": []}))
        assert baseline.classify(conversation(("customer", "apple " * 50 + "banana split"))).intent == "B"

    def test_pattern_characters_in_phrases_are_no_pattern(self) -> None:
        baseline = BaselineClassifier(own_taxonomy({"A": ["(x+)+$", ".*", "[", "\\"], "Other": []}))
        assert baseline.classify(conversation(("customer", "y" + "x" * 50_000))).intent == "Other"
        assert baseline.classify(conversation(("customer", "x"))).intent == "A"

    @pytest.mark.parametrize("missing", SENTIMENTS)
    def test_other_sentiments_are_refused_by_name(self, missing: str) -> None:
        kept = tuple(name for name in SENTIMENTS if name != missing)
        with pytest.raises(ConfigurationError, match=missing):
            BaselineClassifier(own_taxonomy({"Other": []}, (*kept, "Mixed")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a" * 1_000_000, id="one-word", marks=pytest.mark.thorough),
        pytest.param("cancel my where is my status of " * 3_000, id="near-matches"),
        pytest.param("cancel" * 170_000, id="phrase-without-spaces", marks=pytest.mark.thorough),
        pytest.param("\N{FACE WITH TEARS OF JOY}" * 1_000_000, id="emoji", marks=pytest.mark.thorough),
        pytest.param("horrible " * 110_000, id="feelings", marks=pytest.mark.thorough),
        pytest.param("a " * 80_000 + "good but " * 20_000, id="contrast", marks=pytest.mark.thorough),
        pytest.param(" " * 1_000_000 + "x", id="spaces", marks=pytest.mark.thorough),
        pytest.param("@ https:// http://" * 60_000, id="almost-addresses", marks=pytest.mark.thorough),
        pytest.param("!?'" * 350_000, id="punctuation", marks=pytest.mark.thorough),
    ],
)
def test_long_hostile_text_is_classified(text: str) -> None:
    """Work in the square of the length would run into the suite's time limit."""
    intent, topic, sentiment = classified(text)
    assert intent in INTENTS
    assert topic in TOPICS
    assert sentiment in SENTIMENTS


@pytest.mark.thorough
def test_sentiment_reads_about_sixty_thousand_characters_and_no_more() -> None:
    assert classified("blue box " * 6_500 + ". I am disgusted, this is horrible.")[2] == "Negative"
    assert classified("blue box " * 7_000 + ". I am disgusted, this is horrible.")[2] == "Neutral"


def test_a_word_right_after_an_emoji_is_still_a_word() -> None:
    assert classified("\N{PACKAGE}wonderful")[2] == "Positive"


texts = st.text(max_size=200) | st.sampled_from([p for label in SHIPPED.labels("intent") for p in label.phrases])
turns = st.lists(st.tuples(st.sampled_from(["customer", "agent", "unknown"]), texts), max_size=8)


@given(turns)
def test_labels_are_always_of_the_taxonomy_and_categorization_holds_nothing_else(
    said: list[tuple[Sender, str]],
) -> None:
    answer = BASELINE.classify(conversation(*said))
    assert answer.intent in INTENTS
    assert answer.topic in TOPICS
    assert answer.sentiment in SENTIMENTS
    assert answer.categorization == f"Baseline: {answer.intent} about {answer.topic}"
    assert BASELINE.classify(conversation(*said)) == answer


names = st.lists(st.text("abcXYZ/ ", min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=5, unique=True)


@settings(max_examples=min(100, settings().max_examples))  # each builds a classifier, which reads VADER's lexicon
@given(names, st.lists(st.text(max_size=12), max_size=8), turns)
def test_labels_are_always_of_a_replaced_taxonomy(
    labels: list[str], phrases: list[str], said: list[tuple[Sender, str]]
) -> None:
    taxonomy = own_taxonomy({name: phrases[index:] for index, name in enumerate(labels)})
    said.append(("customer", " ".join(phrases)))
    assert BaselineClassifier(taxonomy).classify(conversation(*said)).intent in labels


def test_customer_text_is_not_repeated_in_the_categorization() -> None:
    document = {"_id": 1, "text": "Cancel my order 4711, yours, Josefine Example, jo@example.com"}
    answer = BASELINE.classify(aggregate_conversation(document))
    assert answer.categorization == "Baseline: Cancellation about Shipping/Delivery"


@pytest.mark.thorough  # the start of the embedding classifier, which builds this one, shows it as well
def test_import_and_construction_give_no_warning() -> None:
    code = "from config.taxonomy import load_taxonomy; from embedded.baseline import *; BaselineClassifier(load_taxonomy())"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
