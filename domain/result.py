"""The result document of one source document. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from domain.confidence import needs_review
from domain.conversation import Conversation, Outcome

PROCESSOR_VERSION = "1.0.0"


def build_result(
    document: Mapping[str, Any],
    conversation: Conversation,
    outcome: Outcome,
    job_id: str,
    *,
    keep_original: bool,
    review_below: float | None = None,
) -> dict[str, Any]:
    """Return the result of *document*, without an ``_id``; *keep_original* adds a copy of the document.

    With *review_below* (0 to 1), a result with confidence says whether one of its labels is below that.
    """
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "conversation_number": conversation.conversation_number,
        "source_conversation_id": document.get("_id"),
    }
    if conversation.shape == "query":
        result["query_id"] = document.get("_id")
    result["classification"] = outcome.classification.as_dict()
    result["processing_metadata"] = {
        "processed_at": now,
        "model_used": outcome.model_used,
        "model_digest": outcome.model_digest,
        "processing_duration_ms": outcome.duration_ms,
        "processor_version": PROCESSOR_VERSION,
        "batch_job_id": job_id,
        "attempts": outcome.attempts,
        "prompt_tokens": outcome.prompt_tokens,
        "reply_tokens": outcome.reply_tokens,
        "input_complete": outcome.input_complete,
        "turns_used": len(conversation.turns) if outcome.turns_used is None else outcome.turns_used,
        "turns_total": conversation.turns_total,
        "input_sha256": outcome.input_sha256,
        "fingerprint": outcome.fingerprint,
    }
    if outcome.confidence is not None:
        result["processing_metadata"]["confidence"] = outcome.confidence
        if review_below is not None:
            result["processing_metadata"]["needs_review"] = needs_review(outcome.confidence, review_below)
    for origin in outcome.copied_from:
        result["processing_metadata"]["copied_from"] = origin
    result["created_at"] = now
    if keep_original:
        result["original_conversation"] = dict(document)
    return result
