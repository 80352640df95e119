"""A database with conversations, results and a review queue for tests."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from pymongo.database import Database

from config import Settings, Taxonomy, load_settings, load_taxonomy
from domain.conversation import Conversation
from embedded.baseline import Answer
from embedded.choice import BuiltInClassifier, open_classifier
from mongo_client import DocumentStore
from review.queue import Options, ReviewQueue
from tests.worker.site import conversation

Document = dict[str, Any]
DEFAULTS = Options(control=0.0, double=0.0, lease_s=60)
TEXT = "my parcel is three weeks late and nobody answers"
# What the baseline says about TEXT, so that a result with these labels is not disagreed with.
AGREED = {"intent": "Complaint", "topic": "Shipping/Delivery", "sentiment": "Negative"}


def result(number: int, confidence: float | None = None, **labels: Any) -> Document:
    """Return the result of ``conversation(number)``: AGREED, unless *labels* say otherwise."""
    metadata: Document = {"fingerprint": f"fp-{number}", "model_used": "llama3.2"}
    if confidence is not None:
        metadata["confidence"] = {"intent": confidence, "topic": 0.99, "sentiment": 0.99}
    return {
        "source_conversation_id": number,
        "conversation_number": str(number),
        "classification": {**AGREED, "categorization": "A parcel is late.", **labels},
        "processing_metadata": metadata,
    }


def fill(database: Database[Document], results: Iterable[Document]) -> None:
    """Store *results* and their conversations."""
    stored = list(results)
    database["conversation_set"].insert_many([conversation(one["source_conversation_id"], TEXT) for one in stored])
    database["sentimental_analysis"].insert_many(stored)


def settings_of(uri: str, db_name: str) -> Settings:
    return load_settings(None, mongodb_uri=uri, db_name=db_name, mongodb_backoff_s=0.0)


def open_queue(store: DocumentStore, settings: Settings, options: Options = DEFAULTS) -> ReviewQueue:
    return ReviewQueue(store, settings, load_taxonomy(), options)


class RememberingClassifier:
    """A built-in classifier that labels each text once."""

    def __init__(self, classifier: BuiltInClassifier) -> None:
        self.model = classifier.model
        self._classifier = classifier
        self._answers: dict[str, Answer] = {}

    def answer(self, conversation: Conversation) -> Answer:
        key = conversation.transcript_sha256
        if key not in self._answers:
            self._answers[key] = self._classifier.answer(conversation)
        return self._answers[key]

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        return [self.answer(conversation) for conversation in conversations]


@functools.cache
def shared_classifier(taxonomy: Taxonomy) -> BuiltInClassifier:
    """Return the built-in classifier of this process for *taxonomy*."""
    return RememberingClassifier(open_classifier(taxonomy))
