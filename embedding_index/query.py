"""The vector of a text that is searched for."""

from __future__ import annotations

from embedding_index.providers.contract import Provider
from embedding_index.splitting import split_text
from embedding_index.vector_checks import Vector, checked_vectors, weighted_mean
from error_handler import ConfigurationError, UnusableVectorsError


def query_vector(provider: Provider, text: str) -> Vector:
    """Return the vector of *text*, made like those in the index: a long one in pieces, never cut.

    Raises:
        ConfigurationError: There is no text, or the provider refuses key, address or model.
        ProviderUnavailableError: The provider gives no usable answer.
        UnusableVectorsError: Its answer is no vector.
    """
    if not text.strip():
        raise ConfigurationError("The text to search for is empty; give some words.")
    pieces = split_text(text, provider.limits.input_tokens, provider.count_tokens)
    checked = checked_vectors(provider.embed(pieces).vectors, len(pieces), provider.identity.dimensions)
    if checked.problems:
        raise UnusableVectorsError(
            f"The provider gives no vector for the text: {next(iter(checked.problems.values()))}; try again."
        )
    vectors = [checked.good[place] for place in range(len(pieces))]
    mean = weighted_mean(vectors, [provider.count_tokens(piece) for piece in pieces])
    if mean is None:
        raise UnusableVectorsError("The parts of the text cancel each other out; search for less at once.")
    return mean
