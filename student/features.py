"""The numbers from which a student judges a conversation: MiniLM vectors of what was said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from domain.conversation import Conversation
from embedded.conversation_vectors import vectors_of_each
from embedded.minilm import DIMENSIONS, Encoder

Numbers = NDArray[np.float32]

FEATURES = 2 * DIMENSIONS
KIND = "minilm-request-all-1"  # another way to compute them needs another name: cached vectors and students have it


def features_of(encoder: Encoder, conversations: Sequence[Conversation]) -> Numbers:
    """Return a row of FEATURES numbers for each of *conversations*: the vector of the request, then that of all turns."""
    found = vectors_of_each(encoder, conversations)
    rows = [np.concatenate([one.request, one.all_turns]) for one in found]
    features = np.stack(rows) if rows else np.empty((0, FEATURES), np.float32)
    # As the cache stores them, so that a conversation has the same features wherever they come from.
    return features.astype(np.float16).astype(np.float32)
