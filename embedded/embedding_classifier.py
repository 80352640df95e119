"""A classifier from sentence embeddings, phrases and VADER, for ``--embedded`` without a model server.

Its few weights ship with it (``python -m benchmarks.train_embedded``). docs/baseline.md reports its accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from config.taxonomy import Label, Taxonomy, fold_label
from domain.conversation import Conversation
from embedded.baseline import (
    EMBEDDING_MODEL,
    SENTIMENTS,
    Answer,
    BaselineClassifier,
    classification,
    mean_feeling,
    prose_of,
)
from embedded.conversation_vectors import ConversationVectors, embedded_texts, vectors_of
from embedded.label_scores import LabelScorer, LabelVectors, label_texts, sentiment_of, softmax
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
            known = known_phrases(load_file(PHRASES))
            self._scorers = {
                field: (
                    LabelScorer(
                        taxonomy.labels(field),
                        label_vectors(self._encoder, taxonomy.labels(field), known),
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
        if not self.is_english(conversation):
            return self._baseline.answer(conversation)
        vectors = vectors_of(self._encoder, conversation)
        found = self._baseline.phrase_scores(conversation)
        labels: dict[str, str | list[str]] = {}
        confidence: dict[str, float] = {}
        for field, probabilities in self._probabilities(conversation, vectors, found).items():
            if self._taxonomy.field(field).is_multiple and found[field]:
                labels[field] = self._baseline.labels_by_phrase(field, found[field])
                continue
            other_from = OTHER_FROM.get(field, OTHER_FROM_ELSE)
            allowed = {name: p for name, p in probabilities.items() if p >= other_from or fold_label(name) != "other"}
            label = max(allowed or probabilities, key=lambda name: probabilities[name])
            labels[field] = [label] if self._taxonomy.field(field).is_multiple else label
            confidence[field] = round(probabilities[label], 4)
        in_order = {field: labels[field] for field in self._taxonomy.field_names}
        return Answer(classification(self._taxonomy, in_order, "Embedded"), EMBEDDING_MODEL, confidence)

    def is_english(self, conversation: Conversation) -> bool:
        """Return whether the customer seems to write English; see ``language.is_english``."""
        texts = [prose_of(text[:2000]) for text in conversation.customer_texts[:50]]
        return is_english(texts, lambda text: len(self._encoder.token_ids([text])[0]) - 2)

    def _probabilities(
        self, conversation: Conversation, vectors: ConversationVectors, found: Mapping[str, Mapping[str, float]]
    ) -> dict[str, dict[str, float]]:
        """Return the probability of each label: field -> label -> 0 to 1. *found* is ``phrase_scores``."""
        feelings = self._baseline.feelings(conversation.customer_texts)
        felt = sentiment_of(sentiment_inputs(vectors.customer, feelings), self._sentiment_weights)
        result = {}
        for field, (scorer, weights) in self._scorers.items():
            vector = vectors.request if field == "intent" else vectors.all_turns
            probabilities = softmax(scorer.features(vector, found[field], felt) @ weights)
            result[field] = dict(zip(scorer.names, probabilities.tolist(), strict=True))
        if sentiments := self._baseline.sentiments:
            names = [sentiments[name] for name in SENTIMENTS]
            result["sentiment"] = dict(zip(names, felt.tolist(), strict=True))
        return result


def sentiment_inputs(vector: Numbers, feelings: list[dict[str, float]]) -> Numbers:
    """Return the inputs of the sentiment regression: the vector of the customer's turns and VADER's mean scores."""
    means = [sum(each[key] for each in feelings) / len(feelings) if feelings else 0.0 for key in ("pos", "neg")]
    return np.concatenate([vector, [mean_feeling(feelings), *means]]).astype(np.float32)


def label_vectors(encoder: Encoder, labels: tuple[Label, ...], known: dict[str, Numbers]) -> LabelVectors:
    """Return the vectors of *labels*; *known* has those of some texts already."""
    pairs = [label_texts(label) for label in labels]
    texts = {text for definition, phrases in pairs for text in (definition, *phrases)}
    missing = sorted(texts - known.keys())
    vectors = {**known, **dict(zip(missing, embedded_texts(encoder, missing), strict=True))}
    return LabelVectors(
        np.stack([vectors[definition] for definition, _ in pairs]),
        np.stack([vectors[phrase] for _, phrases in pairs for phrase in phrases]),
        np.array([place for place, (_, phrases) in enumerate(pairs) for _ in phrases]),
    )


def known_phrases(tensors: Tensors) -> dict[str, Numbers]:
    """Return the vectors of the shipped taxonomy's texts, so that a start need not embed 2,500 of them."""
    texts = tensors["texts"].tobytes().decode().split("\n")
    return dict(zip(texts, restored(tensors, "vectors"), strict=True))


def quantized(name: str, vectors: Numbers) -> Tensors:
    """Return *vectors* in one byte for each number, with a scale for each vector; ``restored`` reads them."""
    scales = np.abs(vectors).max(axis=1, keepdims=True) / np.float32(127)
    return {name: np.rint(vectors / scales).astype(np.int8), f"{name}.scales": scales.astype(np.float32)}


def restored(tensors: Tensors, name: str) -> Numbers:
    """Return the vectors that ``quantized`` made; each number is within 0.4 % of the largest."""
    vectors: Numbers = tensors[name].astype(np.float32) * tensors[f"{name}.scales"].astype(np.float32)
    return vectors
