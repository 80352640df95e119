"""The heads of a student: for each field, a logistic regression on the features of a conversation. The owner of the fit.

Predicting needs numpy only. Fitting minimises the cross-entropy to soft targets with L-BFGS, which scipy has: a label that
the model was sure of counts as certain, one that it gave 0.6 counts as 0.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Numbers = NDArray[np.float32]
Doubles = NDArray[np.float64]

STRENGTH = 10.0  # the inverse of the L2 penalty, C of scikit-learn
ITERATIONS = 200
TOLERANCE = 1e-6  # of the loss, between two iterations


@dataclass(frozen=True, slots=True)
class Head:
    """The regression of one field with *names* labels: *weights* has a column for each, *bias* a number for each.

    With *is_multiple*, each label is judged alone; otherwise exactly one is right.
    """

    names: tuple[str, ...]
    is_multiple: bool
    weights: Numbers
    bias: Numbers

    def probabilities(self, features: Numbers) -> Numbers:
        """Return the probability of each label for each row of *features*, 0 to 1."""
        scores = features @ self.weights + self.bias
        return _sigmoid(scores) if self.is_multiple else _softmax(scores)


def one_thread() -> threadpool_limits:
    """Return a context in which each matrix product has one thread. Enter it in the main thread, around ``fit``.

    scipy has a BLAS of its own. A limit that is set before it is loaded, or in another thread, does not reach its optimiser.
    """
    import scipy.optimize  # noqa: F401, PLC0415 - as below

    return threadpool_limits(1, user_api="blas")


def fit(
    names: tuple[str, ...],
    features: Numbers,
    targets: Numbers,
    weights: Numbers,
    *,
    is_multiple: bool,
    on_step: Callable[[], None],
) -> Head:
    """Return the head of one field.

    *features* has a row for each example, *targets* the probability of each label of *names*, 0 to 1; *weights* is how much
    each example counts. *on_step* is called at each iteration.
    """
    from scipy.optimize import minimize  # noqa: PLC0415 - a run with a student does without it

    count, width, size = len(features), features.shape[1], len(names)
    penalty = 1.0 / (STRENGTH * count)
    share = weights / weights.sum()
    # A row for each label: numpy's sums of many short rows are slow.
    goals = np.ascontiguousarray((share[:, None] * targets).T)
    totals = goals.sum(axis=0)

    def loss(flat: Doubles) -> tuple[float, Doubles]:
        matrix = flat.astype(np.float32).reshape(size, width + 1)
        scores = matrix[:, :width] @ features.T + matrix[:, width:]
        value = -float((goals * scores).sum(dtype=np.float64))
        if is_multiple:
            # log(1 + e^s) - t s, for each label
            value += float((share * np.logaddexp(0, scores)).sum(dtype=np.float64))
            error = share * _sigmoid(scores) - goals
        else:
            top = scores.max(axis=0)
            normal = top + np.log(np.exp(scores - top).sum(axis=0))
            value += float((totals * normal).sum(dtype=np.float64))
            error = totals * np.exp(scores - normal) - goals
        gradient = np.hstack([error @ features, error.sum(axis=1, keepdims=True)]).astype(np.float64)
        inner = flat.reshape(size, width + 1)[:, :width]
        gradient[:, :width] += penalty * inner
        return value + penalty / 2 * float((inner * inner).sum()), gradient.ravel()

    start = np.zeros((width + 1) * size)
    options = {"maxiter": ITERATIONS, "ftol": TOLERANCE, "gtol": 1e-6}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options, callback=lambda _: on_step())
    matrix = found.x.astype(np.float32).reshape(size, width + 1)
    return Head(names, is_multiple, np.ascontiguousarray(matrix[:, :width].T), matrix[:, width].copy())


def _softmax(scores: Numbers) -> Numbers:
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: Numbers = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(scores: Numbers) -> Numbers:
    halves: Numbers = 0.5 * (1.0 + np.tanh(0.5 * scores))
    return halves
