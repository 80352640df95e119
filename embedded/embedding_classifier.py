"""A classifier from sentence embeddings, phrases and VADER, for ``--embedded`` without a model server.

Its few weights ship with it (``python -m benchmarks.train_embedded``). docs/baseline.md reports its accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from config.taxonomy import Label, Taxonomy, fold_label
from domain.conversation import EMBEDDING_MODEL, Conversation
from embedded.baseline import SENTIMENTS, Answer, BaselineClassifier, classification, mean_feeling, prose_of
from embedded.conversation_vectors import ConversationVectors, embedded_texts, vectors_of_each
from embedded.label_scores import MESSAGE_WEIGHT, LabelScorer, LabelVectors, label_texts, sentiment_of, softmax
from embedded.language import is_english
from embedded.minilm import Encoder, open_encoder
from error_handler import ConfigurationError

WEIGHTS = Path(__file__).with_name("weights.safetensors")
PHRASES = Path(__file__).with_name("phrases.safetensors")

# Other needs this probability; otherwise the next label counts. Chosen on development lines.
OTHER_FROM = {"intent": 0.35}
OTHER_FROM_ELSE = 0.7

Numbers = NDArray[np.float32]
Tensors = dict[str, NDArray[np.generic]]


class EmbeddingClassifier:
    """Labels English conversations by their meaning, and leaves others to the phrases and VADER.

    While it is in use, each matrix product of numpy in this process uses one thread: several wait for each other by
    spinning, for seconds if other programs use the cores. Safe for several threads.
    """

    model = EMBEDDING_MODEL

    def __init__(self, taxonomy: Taxonomy) -> None:
        """Load the encoder and fit the labels of *taxonomy*.

        Phrases that are not in the shipped taxonomy are embedded now: about 2 s for 1,000 of them.

        Raises:
            ConfigurationError: The package of the encoder is missing or damaged, the weights are damaged, or the taxonomy
                lacks Positive, Neutral or Negative.
        """
        self._taxonomy = taxonomy
        self._limits = threadpool_limits(1, user_api="blas")
        self._baseline = BaselineClassifier(taxonomy)
        self._encoder = open_encoder()
        try:
            weights = load_file(WEIGHTS)
            self._sentiment_weights = weights["sentiment"]
            texts = load_file(PHRASES)
            known, messages = known_phrases(texts), known_messages(texts)
            self._scorers = {
                field: (
                    LabelScorer(
                        taxonomy.labels(field),
                        label_vectors(self._encoder, taxonomy.labels(field), known, messages),
                        restored(weights, f"background.{'intent' if field == 'intent' else 'topic'}"),
                        self._sentiment_weights,
                    ),
                    weights["intent" if field == "intent" else "topic"].astype(np.float64),
                )
                for field in taxonomy.field_names
                if field != "sentiment"
            }
        except (OSError, SafetensorError, KeyError) as exc:
            raise ConfigurationError(
                f"The weights {WEIGHTS.name} and {PHRASES.name} of the embedded classifier cannot be read "
                f"({type(exc).__name__}); restore the folder {WEIGHTS.parent.name}/ of this version."
            ) from exc

    def answer(self, conversation: Conversation) -> Answer:
        """Return the labels and their probabilities: intent and sentiment from the customer's turns, others from all.

        Reads about 1,000 tokens of the conversation. A conversation that is not in English gets the labels of the
        phrases and VADER, without confidence. A field that allows several labels gets those with a phrase, or else the
        most probable one.
        """
        return self.answers([conversation])[0]

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        """Return ``answer`` of each conversation; several at once take less time than one after the other.

        Beside other conversations, a confidence may differ in its last digit.
        """
        places = [place for place, each in enumerate(conversations) if self.is_english(each)]
        english = [conversations[place] for place in places]
        found = [self._baseline.phrase_scores(each) for each in english]
        meant = [
            self._answer(probabilities, phrases)
            for probabilities, phrases in zip(self._probabilities(english, found), found, strict=True)
        ]
        known = dict(zip(places, meant, strict=True))
        return [known.get(place) or self._baseline.answer(each) for place, each in enumerate(conversations)]

    def _answer(
        self, probabilities: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, float]]
    ) -> Answer:
        labels: dict[str, str | list[str]] = {}
        confidence: dict[str, float] = {}
        for field in self._taxonomy.field_names:
            is_multiple = self._taxonomy.field(field).is_multiple
            if is_multiple and found[field]:
                labels[field] = self._baseline.labels_by_phrase(field, found[field])
                continue
            of_labels = probabilities[field]
            other_from = OTHER_FROM.get(field, OTHER_FROM_ELSE)
            allowed = {name: p for name, p in of_labels.items() if p >= other_from or fold_label(name) != "other"}
            label, probability = max((allowed or of_labels).items(), key=lambda pair: pair[1])
            labels[field] = [label] if is_multiple else label
            confidence[field] = round(probability, 4)
        return Answer(classification(self._taxonomy, labels, "Embedded"), EMBEDDING_MODEL, confidence or None)

    def is_english(self, conversation: Conversation) -> bool:
        """Return whether the customer seems to write English; see ``language.is_english``."""
        texts = [prose_of(text[:2000]) for text in conversation.customer_texts[:50]]
        return is_english(texts, lambda text: len(self._encoder.token_ids([text])[0]) - 2)

    def _probabilities(
        self, conversations: Sequence[Conversation], found: Sequence[Mapping[str, Mapping[str, float]]]
    ) -> list[dict[str, dict[str, float]]]:
        """Return the probability of each label: field -> label -> 0 to 1. *found* are ``phrase_scores``."""
        if not conversations:
            return []
        vectors = vectors_of_each(self._encoder, conversations)
        feelings = [self._baseline.feelings(each.customer_texts) for each in conversations]
        inputs = [sentiment_inputs(each.customer, felt) for each, felt in zip(vectors, feelings, strict=True)]
        felt = sentiment_of(np.stack(inputs), self._sentiment_weights)
        result: list[dict[str, dict[str, float]]] = [{} for _ in conversations]

        def add(field: str, names: Sequence[str], probabilities: NDArray[np.float64]) -> None:
            for own, row in zip(result, probabilities.tolist(), strict=True):
                own[field] = dict(zip(names, row, strict=True))

        for field, (scorer, weights) in self._scorers.items():
            features = scorer.features(*read_for(field, vectors), [each[field] for each in found], felt)
            add(field, scorer.names, softmax(features @ weights))
        if sentiments := self._baseline.sentiments:
            add("sentiment", [sentiments[name] for name in SENTIMENTS], felt)
        return result


def sentiment_inputs(vector: Numbers, feelings: list[dict[str, float]]) -> Numbers:
    """Return the inputs of the sentiment regression: the vector of the customer's turns and VADER's mean scores."""
    means = [sum(each[key] for each in feelings) / len(feelings) if feelings else 0.0 for key in ("pos", "neg")]
    return np.concatenate([vector, [mean_feeling(feelings), *means]]).astype(np.float32)


def read_for(field: str, vectors: Sequence[ConversationVectors]) -> tuple[Numbers, Numbers]:
    """Return the vectors that *field* is judged by: those of conversations, and those of the replies (0 if not apart)."""
    if field == "intent":
        return np.stack([each.request for each in vectors]), np.stack([each.replies for each in vectors])
    all_turns = np.stack([each.all_turns for each in vectors])
    return all_turns, np.zeros_like(all_turns)


def label_vectors(
    encoder: Encoder, labels: tuple[Label, ...], known: dict[str, Numbers], messages: Mapping[str, Numbers]
) -> LabelVectors:
    """Return the vectors of *labels*; *known* has those of some texts already, *messages* those of whole messages.

    Messages were written for the labels of the shipped taxonomy. Any other label, or one with another definition, has none.
    """
    pairs = [label_texts(label) for label in labels]
    texts = {text for definition, phrases in pairs for text in (definition, *phrases)}
    missing = sorted(texts - known.keys())
    vectors = {**known, **dict(zip(missing, embedded_texts(encoder, missing), strict=True))}
    phrases = np.stack([vectors[phrase] for _, phrases in pairs for phrase in phrases])
    places = [place for place, (_, phrases) in enumerate(pairs) for _ in phrases]
    written = [messages.get(definition, phrases[:0]) for definition, _ in pairs]
    further = [place for place, own in enumerate(written) for _ in own]
    return LabelVectors(
        np.stack([vectors[definition] for definition, _ in pairs]),
        np.concatenate([phrases, *written]),
        np.array(places + further),
        np.array([1.0] * len(places) + [MESSAGE_WEIGHT] * len(further)),
    )


def known_phrases(tensors: Tensors) -> dict[str, Numbers]:
    """Return the vectors of the shipped taxonomy's texts, so that a start need not embed 2,500 of them."""
    texts = tensors["texts"].tobytes().decode().split("\n")
    return dict(zip(texts, restored(tensors, "vectors"), strict=True))


def known_messages(tensors: Tensors) -> dict[str, Numbers]:
    """Return the vectors of the messages of ``benchmarks/messages.tsv``, by the definition of their intent and topic."""
    vectors, texts = restored(tensors, "messages"), tensors["texts"].tobytes().decode().split("\n")
    definitions = [tensors[f"messages.{field}"] for field in ("intent", "topic")]
    return {texts[each]: vectors[own == each] for own in definitions for each in np.unique(own)}


def quantized(name: str, vectors: Numbers) -> Tensors:
    """Return *vectors* in one byte for each number, with a scale for each vector; ``restored`` reads them."""
    scales = np.abs(vectors).max(axis=1, keepdims=True) / np.float32(127)
    return {name: np.rint(vectors / scales).astype(np.int8), f"{name}.scales": scales.astype(np.float32)}


def restored(tensors: Tensors, name: str) -> Numbers:
    """Return the vectors that ``quantized`` made; each number is within 0.4 % of the largest."""
    vectors: Numbers = tensors[name].astype(np.float32) * tensors[f"{name}.scales"].astype(np.float32)
    return vectors
