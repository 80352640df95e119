"""A repetitive corpus, a model server that labels it consistently, and a worker beside them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from tests.fakes.scripted_server import Handler, ScriptedServer, Step, answer, chat_reply, scripted_server
from tests.worker.site import Site

# Sentence, and the model's labels.
KINDS = (
    ("My parcel {} has not arrived and nobody answers.", ("Order Status", "Shipping/Delivery", "Negative")),
    ("Please refund the invoice {}, I was charged twice.", ("Refund Request", "Account/Billing", "Neutral")),
    ("I cannot log in to account {}, the app shows an error.", ("Technical Support", "Account Access", "Negative")),
)
FIELDS = ("intent", "topic", "sentiment")
NUMBER_WORDS = "one two three four five six seven eight nine ten".split()


class Always(deque[Step]):
    """A script that never ends: each request gets the same step."""

    def __init__(self, step: Step) -> None:
        super().__init__([step])

    def popleft(self) -> Step:
        return self[0]


class ConsistentModel:
    """Labels each conversation by its kind; after ``drift`` everything is a complaint. ``asked`` has the numbers in order."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.asked: list[int] = []
        self.has_drifted = False
        server.script = Always(self._step)

    def _step(self, handler: Handler) -> None:
        messages = json.loads(handler.body).get("messages")
        text = messages[-1]["content"] if messages else ""
        found, number = re.search(r"parcel|invoice|log in", text), re.search(r"case (\d+)", text)
        if found is None or number is None:  # the warm-up
            answer()(handler)
            return
        self.asked.append(int(number[1]))
        intent, topic, sentiment = KINDS[("parcel", "invoice", "log in").index(found[0])][1]
        if self.has_drifted:
            intent = "Complaint"
        labels = {"categorization": "x", "intent": intent, "topic": topic, "sentiment": sentiment}
        answer(chat_reply(json.dumps(labels)))(handler)


def conversation(number: int) -> dict[str, Any]:
    """Return a pending conversation of the kind *number* modulo 3, unlike any other."""
    text = KINDS[number % 3][0].format(f"{NUMBER_WORDS[number // 3 % 10]} of case {number}")
    messages = [{"sender": "customer", "text": text}]
    return {"_id": number, "conversation_number": str(number), "messages": messages, "status": "pending"}


def fill(site: Site, first: int, count: int) -> None:
    """Store *count* conversations from the number *first*."""
    site.source.insert_many([conversation(number) for number in range(first, first + count)])


def by_student(site: Site) -> list[int]:
    """Return the numbers of the conversations that a student labelled."""
    query = {"processing_metadata.label_source": "student"}
    return sorted(one["source_conversation_id"] for one in site.results.find(query))


@contextmanager
def student_site(uri: str, name: str, folder: Path) -> Iterator[tuple[Site, ConsistentModel]]:
    """Yield an empty site, and its model server."""
    with scripted_server() as server, MongoClient[dict[str, Any]](uri, tz_aware=True) as client:
        site = Site(uri, client[name], None, folder)
        site.settings |= {"OLLAMA_ENDPOINT": server.url}
        yield site, ConsistentModel(server)
