"""Fit the weights of the embedded classifier: ``python -m benchmarks.train_embedded DIR``.

DIR holds the labelled files of docs/baseline.md. Only the lines of ``baseline_accuracy.FITTED`` are used: their licence
permits it, and the phrases were not tuned on them. Without DIR, only the sentiment, the phrases and the messages are made.
Writes embedded/weights.safetensors and embedded/phrases.safetensors, the same bytes each time on one machine.
"""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_development_packages

    require_development_packages()

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.baseline_accuracy import directory_examples
from config.taxonomy import Taxonomy, load_taxonomy
from embedded.baseline import SENTIMENTS, BaselineClassifier, prose_of
from embedded.conversation_vectors import embedded_texts, vectors_of_each
from embedded.embedding_classifier import (
    PHRASES,
    WEIGHTS,
    known_messages,
    known_phrases,
    label_vectors,
    quantized,
    read_for,
    restored,
    sentiment_inputs,
)
from embedded.label_scores import FEATURES, LabelScorer, label_texts, sentiment_of, softmax
from embedded.minilm import Encoder, open_encoder

SENTENCES = Path(__file__).with_name("sentiment_sentences.tsv")
MESSAGES = Path(__file__).with_name("messages.tsv")
FIELDS = ("intent", "topic")
BACKGROUND = 50  # conversations of each source
CONVERSATIONS = 500.0  # that all sources together weigh, each source the same
SHRINKAGE = 10.0
SENTIMENT_C = 4.0

Numbers = NDArray[np.float64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Lines to fit one field on: features (lines, labels, features), the gold label's place, source and weight of each."""

    features: Numbers
    gold: NDArray[np.int64]
    sources: NDArray[np.str_]

    def weights(self) -> Numbers:
        """Return the weight of each line."""
        names, places, counts = np.unique(self.sources, return_inverse=True, return_counts=True)
        weights: Numbers = CONVERSATIONS / len(names) / counts[places]
        return weights

    def part(self, chosen: NDArray[np.bool_]) -> Fitted:
        """Return the lines that are *chosen*."""
        return Fitted(self.features[chosen], self.gold[chosen], self.sources[chosen])


def fit_shared(lines: Fitted) -> Numbers:
    """Return the weights of the features that make the gold labels most likely (conditional logit, slightly shrunk)."""
    scale = lines.features.reshape(-1, len(FEATURES)).std(axis=0) + 1e-6
    features, weights, every = lines.features / scale, lines.weights(), np.arange(len(lines.gold))

    def loss(beta: Numbers) -> tuple[float, Numbers]:
        probabilities = softmax(features @ beta)
        likelihood = weights @ np.log(probabilities[every, lines.gold] + 1e-12)
        error = probabilities.copy()
        error[every, lines.gold] -= 1
        gradient = np.einsum("nl,nlk->k", error * weights[:, None], features) + 2 * SHRINKAGE * beta
        return float(-likelihood + SHRINKAGE * beta @ beta), gradient

    beta: Numbers = minimize(loss, np.zeros(len(FEATURES)), jac=True, method="L-BFGS-B").x / scale
    return beta


def temperature(scores: Numbers, gold: NDArray[np.int64], weights: Numbers) -> float:
    """Return the number by which to divide *scores* (lines, labels) so that their probabilities fit *gold* best."""
    grid = np.geomspace(0.25, 8.0, 401)
    every = np.arange(len(gold))
    losses = [-(weights @ np.log(softmax(scores / each)[every, gold] + 1e-12)) for each in grid]
    return float(grid[int(np.argmin(losses))])


def fit_field(lines: Fitted) -> tuple[Numbers, float]:
    """Return the calibrated weights and the temperature, which is that of each source under the weights of the others."""
    scores = np.empty(lines.features.shape[:2])
    for source in np.unique(lines.sources):
        own = lines.sources == source
        scores[own] = lines.features[own] @ fit_shared(lines.part(~own))
    found = temperature(scores, lines.gold, lines.weights())
    return fit_shared(lines) / found, found


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of *path* by the names in its first line."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def read_sentences() -> list[dict[str, str]]:
    """Return ``label``, ``register`` and ``text`` of each sentence, and of each message that has a sentiment."""
    messages = [
        {"label": row["sentiment"], "register": "message", "text": row["text"]}
        for row in read_table(MESSAGES)
        if row["sentiment"]
    ]
    return read_table(SENTENCES) + messages


def fit_sentiment(
    sentences: list[dict[str, str]], encoder: Encoder, baseline: BaselineClassifier
) -> tuple[NDArray[np.float32], float]:
    """Return the calibrated weights, intercept last, and the temperature, that of each register under the others."""
    texts = [" ".join(prose_of(each["text"]).split()) for each in sentences]
    vectors = embedded_texts(encoder, texts)
    inputs = np.stack(
        [sentiment_inputs(vector, baseline.feelings([text])) for vector, text in zip(vectors, texts, strict=True)]
    ).astype(np.float64)
    gold = np.array([SENTIMENTS.index(each["label"]) for each in sentences])
    registers = np.array([each["register"] for each in sentences])

    def fitted(chosen: NDArray[np.bool_]) -> LogisticRegression:
        model = LogisticRegression(C=SENTIMENT_C, class_weight="balanced", max_iter=5000)
        return model.fit(inputs[chosen], gold[chosen])

    scores = np.empty((len(gold), len(SENTIMENTS)))
    for register in np.unique(registers):
        own = registers == register
        if set(gold[~own]) == set(range(len(SENTIMENTS))):
            scores[own] = fitted(~own).decision_function(inputs[own])
    found = temperature(scores, gold, np.ones(len(gold)))
    model = fitted(np.ones(len(gold), bool))
    weights = np.concatenate([model.coef_, model.intercept_[:, None]], axis=1) / found
    return np.ascontiguousarray(
        weights, np.float32
    ), found  # sklearn may give columns first; safetensors would mix them up


def taxonomy_texts(taxonomy: Taxonomy) -> list[str]:
    """Return the texts of *taxonomy* that are embedded, in order."""
    pairs = [label_texts(label) for field in FIELDS for label in taxonomy.labels(field)]
    return sorted({text for definition, phrases in pairs for text in (definition, *phrases)})


def message_tensors(taxonomy: Taxonomy, texts: list[str], encoder: Encoder) -> dict[str, NDArray[Any]]:
    """Return the vectors of the messages, and the places in *texts* of their labels' definitions, for ``known_messages``.

    Raises:
        KeyError: A message has a label that *taxonomy* lacks.
    """
    rows = read_table(MESSAGES)
    tensors = quantized("messages", embedded_texts(encoder, [row["text"] for row in rows]))
    for field in FIELDS:
        places = {label.name: texts.index(label_texts(label)[0]) for label in taxonomy.labels(field)}
        tensors[f"messages.{field}"] = np.array([places[row[field]] for row in rows], np.int16)
    return tensors


def fit_fields(
    directory: Path, taxonomy: Taxonomy, encoder: Encoder, texts: dict[str, NDArray[Any]], sentiment: Vectors
) -> dict[str, NDArray[Any]]:
    """Return background and weights of intent and topic, fitted on the lines of *directory*; print the weights.

    *texts* has the vectors of phrases, definitions and messages, *sentiment* the weights of ``fit_sentiment``.
    """
    baseline = BaselineClassifier(taxonomy)
    known, messages = known_phrases(texts), known_messages(texts)
    examples = [example for _, example in directory_examples(directory) if example.part == "fitted"]
    found = vectors_of_each(encoder, [example.conversation for example in examples])
    felt = [
        sentiment_of(sentiment_inputs(each.customer, baseline.feelings(example.conversation.customer_texts)), sentiment)
        for example, each in zip(examples, found, strict=True)
    ]
    sources = np.array([example.source for example in examples])
    background = np.concatenate([np.flatnonzero(sources == source)[:BACKGROUND] for source in np.unique(sources)])
    tensors: dict[str, NDArray[Any]] = {}
    for field in FIELDS:
        vectors, replies = read_for(field, found)
        tensors |= quantized(f"background.{field}", vectors[background])
        labels = taxonomy.labels(field)
        scorer = LabelScorer(
            labels, label_vectors(encoder, labels, known, messages), restored(tensors, f"background.{field}"), sentiment
        )
        has_gold = np.array([example.gold.get(field) is not None for example in examples])
        chosen = [example for example in examples if example.gold.get(field) is not None]
        phrase_scores = [baseline.phrase_scores(example.conversation)[field] for example in chosen]
        lines = Fitted(
            scorer.features(vectors[has_gold], replies[has_gold], phrase_scores, np.stack(felt)[has_gold]),
            np.array([scorer.names.index(str(example.gold[field])) for example in chosen]),
            sources[has_gold],
        )
        weights, cooled = fit_field(lines)
        tensors[field] = weights.astype(np.float32)
        print(f"{field}: {len(chosen)} lines, temperature {cooled:.2f}")
        for name, weight in zip(FEATURES, weights, strict=True):
            print(f"  {weight:7.3f}  {name}")
    return tensors


def main(arguments: list[str] | None = None) -> int:
    """Fit, write the files and print what was fitted; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_embedded", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="directory with the labelled files")
    options = parser.parse_args(arguments)
    taxonomy = load_taxonomy()
    baseline = BaselineClassifier(taxonomy)
    with threadpool_limits(1, user_api="blas"):
        encoder = open_encoder()
        texts = taxonomy_texts(taxonomy)
        print(f"Embedding {len(texts)} phrases and definitions ...", file=sys.stderr)
        tensors_of_texts = quantized("vectors", embedded_texts(encoder, texts))
        tensors_of_texts["texts"] = np.frombuffer("\n".join(texts).encode(), np.uint8)
        tensors_of_texts |= message_tensors(taxonomy, texts, encoder)
        save_file(tensors_of_texts, PHRASES)
        tensors = dict(load_file(WEIGHTS)) if WEIGHTS.exists() else {}
        sentences = read_sentences()
        print(f"Embedding {len(sentences)} sentences ...", file=sys.stderr)
        tensors["sentiment"], cooled = fit_sentiment(sentences, encoder, baseline)
        print(f"sentiment: {len(sentences)} sentences, temperature {cooled:.2f}")
        if options.directory is not None:
            print("Embedding the labelled lines ...", file=sys.stderr)
            tensors |= fit_fields(options.directory, taxonomy, encoder, tensors_of_texts, tensors["sentiment"])
        save_file({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, WEIGHTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
