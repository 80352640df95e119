"""Results as the worker stores them, drawn at random, for tests and for the pictures in docs/report.md."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

from config import load_taxonomy

START = datetime(2026, 8, 31, tzinfo=UTC)  # a Monday
CHANNELS = ("email", "chat", "phone", "web form", None)
MODELS = (("qwen3:8b", "a1" * 32, "c0ffee" * 10), ("llama3.1:8b", "b2" * 32, "c0ffee" * 10))


def result(
    labels: Mapping[str, Any],
    at: datetime | None = START,
    *,
    channel: Any = "email",
    confidence: float | None = None,
    model: str = "qwen3:8b",
    **changes: Any,
) -> dict[str, Any]:
    """Return one result; *changes* replace its fields."""
    made: dict[str, Any] = {
        "conversation_number": "1",
        "source_conversation_id": ObjectId(),
        "classification": {**labels, "categorization": "A summary that quotes the customer."},
        "processing_metadata": {"processed_at": START, "model_used": model, "model_digest": "a1" * 32},
        "created_at": START + timedelta(days=400),
        "conversation": {"turns": 2},
    }
    if at is not None:
        made["conversation"]["last_message_at"] = at
    if channel is not None:
        made["conversation"]["channel"] = channel
    if confidence is not None:
        made["processing_metadata"]["confidence"] = dict.fromkeys(labels, confidence)
    return made | changes


def correction(of: Mapping[str, Any], field: str, label: Any, **changes: Any) -> dict[str, Any]:
    """Return the decision of a person on *field* of the result *of*."""
    return {
        "source_conversation_id": of["source_conversation_id"],
        "field": field,
        "from": of["classification"].get(field),
        "to": label,
        "reviewer": "ann",
        "at": START,
        "source": "random",
    } | changes


def random_results(count: int, days: int = 91, seed: int = 1) -> list[dict[str, Any]]:
    """Return *count* results of *days* days; in the last week, more of them are about an outage."""
    drawn = random.Random(seed)
    taxonomy = load_taxonomy()
    weights = {name: [1 / (place + 2) for place, _ in enumerate(taxonomy.names(name))] for name in taxonomy.field_names}
    weights["sentiment"] = [2, 4, 3]
    found = []
    for number in range(count):
        at = START + timedelta(days=days * drawn.random())
        labels = {name: drawn.choices(taxonomy.names(name), weights[name])[0] for name in taxonomy.field_names}
        if at > START + timedelta(days=days - 7) and drawn.random() < 0.08:
            labels |= {"topic": taxonomy.names("topic")[-2], "sentiment": "Negative"}
        model, digest, prompt = MODELS[at < START + timedelta(days=50)]
        one = result(labels, at, channel=drawn.choices(CHANNELS, (5, 4, 2, 2, 1))[0], model=model)
        one["conversation_number"] = str(number)
        confidence = {name: drawn.random() ** 0.25 for name in labels}
        one["processing_metadata"] |= {"model_digest": digest, "plan": prompt, "confidence": confidence}
        found.append(one)
    return found


def random_corrections(results: list[dict[str, Any]], share: float = 0.03, seed: int = 2) -> list[dict[str, Any]]:
    """Return decisions on all fields of a random *share* of *results*: the control sample; 8 % of the labels change."""
    drawn = random.Random(seed)
    taxonomy = load_taxonomy()
    found = []
    for one in results:
        if drawn.random() < share:
            for name in taxonomy.field_names:
                label = one["classification"][name]
                label = drawn.choice(taxonomy.names(name)) if drawn.random() < 0.08 else label
                found.append(correction(one, name, label, sampling_probability=1 / len(results)))
    return found


def random_failures(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Return *count* source documents that failed or were skipped."""
    drawn = random.Random(seed)
    reasons = ("label_outside: the answer has a label outside the taxonomy", "timeout: no answer within 120 s")
    return [
        {"conversation_number": str(number), "status": "failed", "status_reason": drawn.choice(reasons)}
        if number % 3
        else {"conversation_number": str(number), "status": "skipped", "status_reason": "skipped_no_text: no text"}
        for number in range(count)
    ]
