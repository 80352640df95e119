"""Label Intercom conversations when a customer or a teammate writes.

python examples/intercom_webhook.py --secret-file client_secret.txt --api-key-file triad_key.txt

In Intercom's Developer Hub, subscribe the app to conversation.user.created, conversation.user.replied and
conversation.admin.replied with the address of this receiver. The secret is the client secret of the app. With --write, labels
become custom attributes of the conversation, which you create first (triad_intent, triad_topic, triad_sentiment):

    --write --token-file intercom_token.txt

A notification carries the first message and the newest parts, not always all parts.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

from webhook_receiver import Bearer, HelpDesk, run

TOPICS = ("conversation.user.created", "conversation.user.replied", "conversation.admin.replied")
CUSTOMERS = ("user", "lead", "contact", "visitor")


class PlainText(HTMLParser):
    """The text of a message, which Intercom sends as HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        """End a line with each paragraph."""
        self.text += "\n" if tag in ("p", "div", "li") else ""


def is_genuine(secret: bytes, headers: Mapping[str, str], body: bytes) -> bool:
    """Return whether Intercom signed *body*."""
    expected = f"sha1={hmac.digest(secret, body, hashlib.sha1).hex()}"
    return hmac.compare_digest(expected.encode(), headers.get("X-Hub-Signature", "").encode())


def conversation_of(payload: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first message and the parts of the notification that are not internal notes."""
    if payload["topic"] not in TOPICS:  # such as "ping"
        return None
    item = payload["data"]["item"]
    first = {**item["source"], "created_at": item["created_at"], "part_type": "comment"}
    parts = [first, *(item.get("conversation_parts") or {}).get("conversation_parts", [])]
    messages = [
        {
            "sender": "customer" if part["author"]["type"] in CUSTOMERS else "agent",
            "timestamp": datetime.fromtimestamp(part["created_at"], UTC).isoformat(),
            "text": PlainText(part["body"]).text.strip(),
        }
        for part in parts
        if part.get("body") and part["part_type"] != "note"
    ]
    return {"conversation_number": str(item["id"]), "messages": messages}


def labels_request(number: str, labels: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the request that sets the custom attributes ``triad_<field>``."""
    attributes = {
        f"triad_{field}": value if isinstance(value, str) else ", ".join(value) for field, value in labels.items()
    }
    return f"/conversations/{number}", {"custom_attributes": attributes}


INTERCOM = HelpDesk(
    "intercom",
    "https://api.intercom.io",
    is_genuine,
    conversation_of,
    labels_request,
    lambda _user, token: Bearer(token),
)

if __name__ == "__main__":
    run(INTERCOM)
