"""What every embedding provider is, however it makes its vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embedding_index.items import ModelIdentity

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most that one call takes; *input_tokens* is of one input, *request_tokens* of all its inputs together.

    None: no limit is known.
    """

    inputs: int
    input_tokens: int
    request_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The vectors of one call as the provider sent them, in the order of the inputs, unchecked but for that order.

    *vectors* are as many lists as came, each of any length; *tokens* is what was billed, None where it was not told.
    """

    vectors: Sequence[Sequence[float] | Vectors]
    tokens: int | None


class Provider(Protocol):
    """A source of vectors. It works on *max_concurrent* calls of ``embed`` at once; some more threads may be reading answers.

    *leaves_house* where texts go to an address outside this machine.
    """

    identity: ModelIdentity
    limits: RequestLimits
    max_concurrent: int
    leaves_house: bool

    def count_tokens(self, text: str) -> int:
        """Return how many tokens *text* has, or the most that it may have where that is only estimated; at least 1."""

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts*, which are within the limits and not empty. One HTTP request, no repetition.

        *on_answer* is called, from any thread, where the body of a good answer begins: the provider has done its work, and
        another call may be made while this answer is being read. Where it is not called, the return says the same.

        Raises:
            ProviderBusyError: Nothing was done; it says how long to wait.
            ProviderUnavailableError: No usable answer; another attempt may help.
            ProviderRejectedError: It will never take this request as it is.
            ConfigurationError: The key, the address or the model is wrong; no other request would be taken either.
        """

    def close(self) -> None:
        """Give back what it holds."""
