"""Label Zendesk tickets when they are created or answered.

python examples/zendesk_webhook.py --secret-file signing_secret.txt --api-key-file triad_key.txt

In Zendesk, create a webhook for the ticket events "Ticket created" and "Comment added" with the address of this receiver, and
copy its signing secret into the file. With --write, labels become tags of the ticket:

    --write --vendor-url https://SUBDOMAIN.zendesk.com --user EMAIL --token-file zendesk_token.txt

An event carries the description and the newest comment, not the comments between them.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from requests.auth import HTTPBasicAuth
from webhook_receiver import HelpDesk, run

CREATED, COMMENTED = "zen:event-type:ticket.created", "zen:event-type:ticket.comment_added"
MAX_AGE_S = 300  # of a signature, against repeated requests


def is_genuine(secret: bytes, headers: Mapping[str, str], body: bytes) -> bool:
    """Return whether Zendesk signed timestamp and body, and did so recently."""
    timestamp = headers.get("X-Zendesk-Webhook-Signature-Timestamp", "")
    signature = headers.get("X-Zendesk-Webhook-Signature", "")
    expected = base64.b64encode(hmac.digest(secret, timestamp.encode() + body, hashlib.sha256))
    if not hmac.compare_digest(expected, signature.encode()):
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(timestamp)
    return abs(age.total_seconds()) <= MAX_AGE_S


def conversation_of(payload: dict[str, Any]) -> dict[str, Any] | None:
    """Return the ticket's description, and the newest comment if it is public."""
    ticket, event = payload["detail"], payload["event"]
    messages = [{"sender": "customer", "timestamp": ticket["created_at"], "text": ticket["description"]}]
    if payload["type"] == COMMENTED:
        comment = event["comment"]
        if not comment["is_public"] or comment["body"] == ticket["description"]:  # the first comment: CREATED has it
            return None
        sender = "agent" if comment["author"]["is_staff"] else "customer"
        messages.append({"sender": sender, "timestamp": payload["time"], "text": comment["body"]})
    elif payload["type"] != CREATED:
        return None
    return {"conversation_number": str(ticket["id"]), "messages": messages}


def labels_request(number: str, labels: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the request that adds tags such as ``intent_order_status``; other tags of the ticket stay."""
    pairs = [(field, one) for field, value in labels.items() for one in ([value] if isinstance(value, str) else value)]
    tags = [re.sub(r"\W+", "_", f"{field}_{one}".lower()) for field, one in pairs]
    return f"/api/v2/tickets/{number}/tags", {"tags": tags}


ZENDESK = HelpDesk(
    "zendesk",
    "https://SUBDOMAIN.zendesk.com",
    is_genuine,
    conversation_of,
    labels_request,
    lambda user, token: HTTPBasicAuth(f"{user}/token", token),
)

if __name__ == "__main__":
    run(ZENDESK)
