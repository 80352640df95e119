"""Conversations longer than a window, and the check of their labels."""

from __future__ import annotations

from config.taxonomy import load_taxonomy
from tests.fakes.fake_ollama_server.labels import labels_from_digest
from tests.worker.site import Document, Site, conversation, model_of

SENTENCE = "the app says my order does not exist and the agent asked me to wait for another day "


def long_conversation(number: int, turns: int) -> Document:
    """A conversation of *turns* turns of 90 characters."""
    senders = ("customer", "agent")
    messages = [{"sender": senders[turn % 2], "text": f"Case {number:05d} {turn}: {SENTENCE}"} for turn in range(turns)]
    return conversation(number, messages=messages)


def check_labels_are_of_what_was_sent(site: Site) -> dict[int, Document]:
    """Assert that each result has the labels of a user message as it was sent, whole; return the results by id."""
    taxonomy = load_taxonomy()
    enums = [taxonomy.names(name) for name in ("intent", "topic", "sentiment")]
    sent = [bytes.fromhex(record["user_sha256"]) for record in model_of(site).requests()]
    whole = [labels_from_digest(digest, *enums) for digest in sent]
    results = list(site.results.find())
    for result in results:
        assert result["classification"] in whole, result["source_conversation_id"]
    return {result["source_conversation_id"]: result for result in results}
