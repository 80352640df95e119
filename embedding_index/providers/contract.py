"""The interface of all embedding providers, and the token estimate that several share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model_server.tokens import most_tokens

END_TOKENS = 2  # models of the BERT family put them around each input
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that made a vector. Vectors of different identities must never be compared.

    *dimensions* is the length of the vectors; None until the provider's first answer.
    """

    provider: str
    model: str
    dimensions: int | None = None

    def __str__(self) -> str:
        size = f", {self.dimensions} dimensions" if self.dimensions else ""
        return f"{self.model} of {self.provider}{size}"

    def is_same_model(self, other: ModelIdentity) -> bool:
        """Return whether vectors of both can be compared; an unknown length fits any."""
        sizes = {self.dimensions, other.dimensions} - {None}
        return (self.provider, self.model) == (other.provider, other.model) and len(sizes) <= 1


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one call: *input_tokens* for one input, *request_tokens* for all its inputs together (None: unlimited)."""

    inputs: int
    input_tokens: int
    request_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The vectors of one call as the provider sent them, in the order of the inputs, otherwise unchecked.

    *vectors* may be of any number and lengths. *tokens* are as billed, None if unknown.
    """

    vectors: Sequence[Sequence[float] | Vectors]
    tokens: int | None


class Provider(Protocol):
    """A source of vectors. At most *max_concurrent* calls of ``embed`` may wait for an answer; more threads may read one.

    *is_external*: texts leave this machine.
    """

    identity: ModelIdentity
    limits: RequestLimits
    max_concurrent: int
    is_external: bool

    def count_tokens(self, text: str) -> int:
        """Return the tokens of *text*, or the most it may have if that is only estimated; at least 1."""

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts*, which are within the limits and not empty. One request, no retry.

        *on_answer* is called, from any thread, when the body of a good answer begins: another call may start while this
        answer is read. It need not be called.

        Raises:
            ProviderBusyError: Nothing was done; the error has the time to wait.
            ProviderUnavailableError: No usable answer; a retry may help.
            ProviderRejectedError: It will never accept this request.
            ConfigurationError: The key, the address or the model is wrong, so every request fails.
        """

    def close(self) -> None:
        """Release connections, threads and memory."""


def estimated_tokens(text: str) -> int:
    """Return the most tokens that *text* is likely to have for a model whose tokenizer is not installed, at least 1.

    Text that is no language (base64, random letters) can have half as many tokens again. Most models have fewer.
    """
    return math.ceil(sum(most_tokens(text).values())) + END_TOKENS
