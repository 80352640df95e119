"""The vector of a text that is searched for."""

from __future__ import annotations

from embedding_index.providers.contract import Provider, Vectors
from embedding_index.splitting import split_text
from embedding_index.vector_checks import mean_of_pieces, require_vectors
from error_handler import ConfigurationError


def query_vector(provider: Provider, text: str) -> Vectors:
    """Return the vector of *text*, made like those in the index: a long one in pieces, never cut.

    Raises:
        ConfigurationError: There is no text, or the provider refuses key, address or model.
        ProviderUnavailableError: The provider gives no usable answer.
    """
    if not text.strip():
        raise ConfigurationError("The text to search for is empty; give some words.")
    pieces = split_text(text, provider.limits.input_tokens, provider.count_tokens)
    answer = provider.embed(pieces)
    vectors = require_vectors(answer, len(pieces), provider.identity)
    return mean_of_pieces(vectors, [provider.count_tokens(piece) for piece in pieces])
