"""Probabilities of the labels of one field, from a few weights that all labels share.

The features compare a conversation with the name, definition and phrases of each label, so that the weights hold for any
taxonomy. docs/baseline.md reports how they were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.taxonomy import Label, fold_label

NEAREST = 3  # phrases whose similarity counts
FEATURES = (
    "log of the phrase weight",
    "share of the phrase weight",
    "similarity to the definition",
    "similarity to the nearest phrases",
    "score of the regression on the phrases",
    "is Other",
    "is Other, and no phrase found",
    "probability of the same sentiment",
    "score of the regression for the replies",
)

RIDGE = 5.0
DEFINITION_WEIGHT = 5.0  # of one definition among phrases, in the regression
MESSAGE_WEIGHT = 3.0  # of one message
LEAST_DEVIATION = 1e-3

Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LabelVectors:
    """The vectors of one field: a definition for each label; its phrases and messages, with label's place and weight of each."""

    definitions: Numbers
    phrases: Numbers
    places: NDArray[np.int64]
    weights: NDArray[np.float64]


def label_texts(label: Label) -> tuple[str, tuple[str, ...]]:
    """Return the texts of *label* to embed: name with definition, and phrases (the definition again without any)."""
    definition = f"{label.name}: {label.definition}"
    return definition, label.phrases or (definition,)


class LabelScorer:
    """The labels of one field, compared with conversations."""

    def __init__(
        self, labels: Sequence[Label], vectors: LabelVectors, background: Numbers, sentiment_weights: Numbers
    ) -> None:
        """Fit the regression on the phrases, and measure the features on *background*: vectors of other conversations.

        Similarities count in standard deviations from their mean over the background. A label that is near to every
        text has no advantage then. *sentiment_weights* are those of ``sentiment_of``; they tell which labels have angry
        or happy phrases.
        """
        names = [label.name for label in labels]
        self.names = names
        # Without phrases nothing can be missing, so nothing speaks for Other.
        self._is_other = np.array([fold_label(name) == "other" for name in names]) & any(
            each.phrases for each in labels
        )
        order = np.argsort(vectors.places, kind="stable")
        self._phrases = np.ascontiguousarray(vectors.phrases[order].T)
        counts = np.bincount(vectors.places, minlength=len(names))
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._definitions = np.ascontiguousarray(vectors.definitions.T)
        self._weights = _regression(vectors, len(names))
        without_vader = np.zeros((len(vectors.phrases), sentiment_weights.shape[1] - 1 - vectors.phrases.shape[1]))
        felt = sentiment_of(np.concatenate([vectors.phrases, without_vader], axis=1), sentiment_weights)
        self._sentiments = np.stack([felt[vectors.places == place].mean(axis=0) for place in range(len(names))])
        raw = self._similarities(background)
        self._mean = raw.mean(axis=0)
        self._deviation = np.maximum(raw.std(axis=0), LEAST_DEVIATION)

    def features(
        self,
        vectors: Numbers,
        replies: Numbers,
        phrase_weights: Sequence[Mapping[str, float]],
        sentiments: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return the features of each label: shape (conversations, labels, len(FEATURES)).

        *vectors* are of conversations, *replies* of the turns of agents in them (a row of zeros does not count),
        *phrase_weights* those of ``BaselineClassifier.phrase_scores`` for the field, *sentiments* the probabilities of
        each conversation's sentiments.
        """
        found = np.array([[weights.get(name, 0.0) for name in self.names] for weights in phrase_weights])
        total = found.sum(axis=1, keepdims=True)
        similar = (self._similarities(vectors) - self._mean) / self._deviation
        columns = [np.log1p(found), found / np.where(total, total, 1.0), *np.moveaxis(similar, 2, 0)]
        is_other = np.broadcast_to(self._is_other, found.shape)
        columns += [is_other, is_other & (total == 0), sentiments @ self._sentiments.T]
        of_replies = (replies @ self._weights - self._mean[:, 2]) / self._deviation[:, 2]
        columns.append(np.where(replies.any(axis=1, keepdims=True), of_replies, 0.0))
        return np.stack([np.asarray(column, np.float64) for column in columns], axis=2)

    def _similarities(self, vectors: Numbers) -> Numbers:
        """Return definition, nearest phrases and regression for each label: shape (vectors, labels, 3)."""
        to_phrases = vectors @ self._phrases
        nearest = np.empty((len(vectors), len(self.names)), np.float32)
        for place, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            counted = min(NEAREST, end - start)
            own = to_phrases[:, start:end]
            nearest[:, place] = np.partition(own, end - start - counted, axis=1)[:, end - start - counted :].mean(
                axis=1
            )
        return np.stack([vectors @ self._definitions, nearest, vectors @ self._weights], axis=2)


def _regression(vectors: LabelVectors, count: int) -> Numbers:
    """Return the weights of a ridge regression from vectors to labels: shape (dimensions, labels).

    In closed form, because it is fitted at each start. Labels weigh the same, however many phrases they have. The
    intercept is left out: the background removes it.
    """
    x = np.concatenate([vectors.phrases, vectors.definitions]).astype(np.float64)
    places = np.concatenate([vectors.places, np.arange(count)])
    weights = np.concatenate([vectors.weights, np.full(count, DEFINITION_WEIGHT)])
    sums = np.bincount(places, weights, minlength=count)
    weights *= (sums.mean() / sums)[places]
    y = np.eye(count)[places]
    total = weights.sum()
    x = x - weights @ x / total
    y = y - weights @ y / total
    solved = np.linalg.solve((x.T * weights) @ x + RIDGE * np.eye(x.shape[1]), (x.T * weights) @ y)
    return solved.astype(np.float32)


def sentiment_of(inputs: NDArray[Any], weights: Numbers) -> NDArray[np.float64]:
    """Return the probabilities of the sentiments along the last axis; the last column of *weights* is the intercept."""
    return softmax((inputs @ weights[:, :-1].T + weights[:, -1]).astype(np.float64))


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probabilities of *scores* along the last axis."""
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = raised / raised.sum(axis=-1, keepdims=True)
    return probabilities
