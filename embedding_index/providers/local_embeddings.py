"""Embeddings inside this process, by the encoder of ``embedded.minilm``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from config.index_settings import IndexSettings
from embedded import minilm
from embedded.minilm import DIMENSIONS, INPUT_TOKENS, INSTALL, MODEL
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits
from error_handler import ConfigurationError, ProviderRejectedError

MOST_INPUTS = 2048


class LocalProvider:
    """The model of the installed package. It needs no server, key or network, and costs nothing. ``close`` it.

    It computes parts of a call in parallel, each on one core. While it is open, each matrix product of numpy in this
    process uses one thread: several threads wait for each other by spinning, for seconds if other programs use the cores.
    """

    is_external = False

    def __init__(self, index: IndexSettings) -> None:
        """Load the model: 90 MB.

        Raises:
            ConfigurationError: The package is not installed or damaged, or *index* names another model or length.
        """
        if index.model != MODEL:
            raise ConfigurationError(
                f"EMBEDDING_PROVIDER=local has one model, {MODEL}; remove EMBEDDING_MODEL, or choose another provider."
            )
        if index.dimensions not in (None, DIMENSIONS):
            raise ConfigurationError(f"vectors of {MODEL} have {DIMENSIONS} numbers; remove EMBEDDING_DIMENSIONS.")
        folder = minilm.model_folder()
        if folder is None:
            raise ConfigurationError(
                f"EMBEDDING_PROVIDER=local needs a package that contains its model; run: {INSTALL}"
            )
        self.identity = ModelIdentity("local", MODEL, DIMENSIONS)
        self.limits = RequestLimits(MOST_INPUTS, INPUT_TOKENS, None)
        self.max_concurrent = 1  # one call uses every core by itself
        self._encoder = minilm.Encoder(folder)
        with ExitStack() as stack:
            stack.enter_context(threadpool_limits(1, user_api="blas"))
            self._threads = stack.enter_context(ThreadPoolExecutor(os.cpu_count(), "local-embeddings"))
            self._stack = stack.pop_all()

    def count_tokens(self, text: str) -> int:
        """Return the tokens of *text*, including the two that mark its ends."""
        return len(self._encoder.token_ids([text])[0])

    def embed(self, texts: Sequence[str], on_answer: Callable[[], None] | None = None) -> Answer:
        """Return the vectors of *texts*, of length 1. A vector does not depend on the other texts (1e-5).

        Raises:
            ProviderRejectedError: A text is longer than 256 tokens.
        """
        ids = self._encoder.token_ids(texts)
        longest = max(map(len, ids), default=0)
        if longest > INPUT_TOKENS:
            raise ProviderRejectedError(f"a text of {longest} tokens is longer than the model takes ({INPUT_TOKENS})")
        vectors = np.empty((len(ids), DIMENSIONS), np.float32)
        chunks = list(minilm.chunks_of([len(tokens) for tokens in ids]))
        computed = self._threads.map(lambda places: self._encoder.forward([ids[place] for place in places]), chunks)
        for places, found in zip(chunks, computed, strict=True):
            vectors[places] = found
        if on_answer is not None:
            on_answer()
        return Answer(list(vectors), sum(map(len, ids)))

    def close(self) -> None:
        """End the threads, and restore those of numpy."""
        self._stack.close()
