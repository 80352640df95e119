"""The vector of a text that is searched for."""

from __future__ import annotations

from embedding_index.packing import pack
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
    count, limits = provider.count_tokens, provider.limits
    pieces = [piece for piece in split_text(text, limits.input_tokens, count) if piece.strip()]
    sizes = [count(piece) for piece in pieces]
    vectors: dict[int, Vector] = {}
    for places in pack(sizes, limits, limits.inputs):
        answer = provider.embed([pieces[place] for place in places])
        checked = checked_vectors(answer.vectors, len(places), provider.identity.dimensions)
        if checked.problems:
            raise UnusableVectorsError(
                f"The provider gives no vector for the text: {next(iter(checked.problems.values()))}; try again."
            )
        vectors |= {places[place]: vector for place, vector in checked.good.items()}
    mean = weighted_mean([vectors[place] for place in range(len(pieces))], sizes)
    if mean is None:
        raise UnusableVectorsError("The parts of the text cancel each other out; search for less at once.")
    return mean
