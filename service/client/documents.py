"""A document of any accepted shape becomes a request to the REST service. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from aggregator import aggregate_conversation, document_shape
from service.client.protocol import ServiceRequest, build_request
from storage.extended_json import id_text

MAX_NUMBER_CHARACTERS = 200
MAX_TIMESTAMP_CHARACTERS = 64


def request_for(document: Mapping[str, Any], position: int) -> ServiceRequest:
    """Return the request that asks for the labels of *document*, which is number *position* (from 1) of its file.

    Texts go as they are, in the order listed. The service knows two senders: a turn whose sender the
    aggregator does not know goes as the agent's, because sentiment is judged from the customer's turns.
    A document without conversation_number gets its ``_id`` for one, else *position*.

    Raises:
        SkippedDocumentError: There is no usable text, or nothing that the customer said.
        RequestError: A text cannot be sent.
    """
    conversation = aggregate_conversation(document)
    shape = document_shape(document)
    entries = [document] if shape == "query" else document[str(shape)]
    listed = [entry for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("text"), str)]
    # With numbers in place of the texts, the aggregator says who spoke and when, and the texts stay as they are.
    numbered = [{**entry, "text": str(index)} for index, entry in enumerate(listed)]
    turns = aggregate_conversation(numbered[0] if shape == "query" else {str(shape): numbered}).turns
    senders = {int(turn.text): (turn.sender, turn.at) for turn in turns}
    messages = []
    for index, entry in enumerate(listed):
        sender, at = senders[index]
        message = {"sender": "customer" if sender == "customer" else "agent"}
        timestamp = _timestamp(entry.get("timestamp") if shape == "messages" else None, at)
        messages.append(message | ({"timestamp": timestamp} if timestamp else {}) | {"text": entry["text"]})
    number = conversation.conversation_number or ("_id" in document and id_text(document["_id"])) or str(position)
    return build_request(number[:MAX_NUMBER_CHARACTERS], messages)


def _timestamp(given: Any, at: datetime | None) -> str | None:
    """Return *given* where it is a text that the service takes, else the time that was read."""
    if isinstance(given, str) and 0 < len(given) <= MAX_TIMESTAMP_CHARACTERS:
        return given
    return at.isoformat() if at is not None else None
