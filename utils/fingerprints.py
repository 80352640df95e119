"""What tells whether a result still fits its document and the way a run would make it now. Pure."""

from __future__ import annotations

import hashlib

from utils.conversation import Conversation


def input_sha256(conversation: Conversation) -> str:
    """Return the SHA-256 of what the model is shown of *conversation*, 64 hexadecimal digits.

    The whole transcript, before anything is cut: who said what, in order; neither ids nor times.
    """
    return conversation.transcript_sha256


def result_fingerprint(plan: str, input_hash: str) -> str:
    """Return the fingerprint of a result: *plan* is ollama_protocol.plan_fingerprint, *input_hash* of input_sha256."""
    return hashlib.sha256(f"{plan}:{input_hash}".encode()).hexdigest()
