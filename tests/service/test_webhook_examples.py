"""The examples for webhooks of help desks, run against the real service; payloads have the vendors' documented form."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prompt_builder import chat_messages
from tests.fakes.fake_ollama import FakeOllama, text_sha256
from tests.forked_process import ForkedProcess
from tests.service.service_process import ROOT, ServiceProcess, free_port, serve, service_environment
from tests.worker.site import until

# The secret that Zendesk's documentation uses for tests.
SECRET = "dGhpc19zZWNyZXRfaXNfZm9yX3Rlc3Rpbmdfb25seQ=="
KEY = "webhook-key-0123456789"

TICKET = {
    "actor_id": "8447388090494",
    "assignee_id": "8447388090494",
    "brand_id": "8447346621310",
    "created_at": "2026-11-21T10:00:00Z",
    "custom_status": "8447320465790",
    "description": "My parcel is three weeks late.",
    "external_id": None,
    "form_id": "8646151517822",
    "group_id": "8447320466430",
    "id": "5158",
    "is_public": True,
    "organization_id": "8447346622462",
    "priority": "LOW",
    "requester_id": "8447388090494",
    "status": "OPEN",
    "subject": "Parcel",
    "submitter_id": "8447388090494",
    "tags": ["order"],
    "type": "TASK",
    "updated_at": "2026-11-21T10:05:00Z",
    "via": {"channel": "web_service"},
}


def zendesk_event(kind: str = "created", **event: Any) -> dict[str, Any]:
    """Return a ticket event of Zendesk."""
    return {
        "account_id": 22129848,
        "detail": TICKET,
        "event": {"meta": {"sequence": {"id": "01GFXGBX7YZ9ASWTCVMASTK8ZS", "position": 1}}, **event},
        "id": "95a26cb1-2b46-4a7b-9d5a-4dd1a2a7d3e0",
        "subject": "zen:ticket:5158",
        "time": "2026-11-21T10:05:00Z",
        "type": f"zen:event-type:ticket.{kind}",
        "zendesk_event_version": "2022-11-06",
    }


def comment(body: str, *, is_public: bool = True, is_staff: bool = True) -> dict[str, Any]:
    author = {"id": "8447388090494", "is_staff": is_staff, "name": "A"}
    return {"comment": {"id": "8676303117182", "body": body, "is_public": is_public, "author": author}}


def intercom_notification(topic: str = "conversation.user.replied") -> dict[str, Any]:
    """Return a notification of Intercom."""
    parts = [
        part(1, "comment", "<p>We are sorry.</p>", "admin"),
        part(2, "note", "<p>secret remark</p>", "admin"),
        part(3, "assignment", None, "bot"),
        part(4, "comment", "<p>Where is it &amp; when does it come?</p><p>Thanks</p>", "user"),
    ]
    item = {
        "type": "conversation",
        "id": "215468100",
        "created_at": 1_795_000_000,
        "updated_at": 1_795_000_600,
        "source": {
            "type": "conversation",
            "id": "2170000000",
            "delivered_as": "customer_initiated",
            "subject": "",
            "body": "<p>My parcel is three weeks late.</p>",
            "author": {"type": "user", "id": "5ba682d23d7cf92bef87bfd4", "name": "A", "email": "a@example.com"},
            "attachments": [],
        },
        "conversation_parts": {"type": "conversation_part.list", "conversation_parts": parts, "total_count": 4},
    }
    return {
        "type": "notification_event",
        "app_id": "a86dr8yl",
        "data": {"type": "notification_event_data", "item": item},
        "links": {},
        "id": "notif_78c122d0-23ba-11e4-9464-79b01267cc2e",
        "self": None,
        "topic": topic,
        "delivery_status": "pending",
        "delivery_attempts": 1,
        "delivered_at": 0,
        "first_sent_at": 1_795_000_601,
        "created_at": 1_795_000_600,
    }


def part(number: int, kind: str, body: str | None, author: str) -> dict[str, Any]:
    shown = {"type": "conversation_part", "id": str(number), "part_type": kind, "body": body}
    return {**shown, "created_at": 1_795_000_000 + number, "author": {"type": author, "id": "1"}}


def signed_by_zendesk(body: bytes, age_s: float = 0.0) -> dict[str, str]:
    timestamp = (datetime.now(UTC) - timedelta(seconds=age_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
    digest = hmac.digest(SECRET.encode(), timestamp.encode() + body, hashlib.sha256)
    return {
        "X-Zendesk-Webhook-Signature": base64.b64encode(digest).decode(),
        "X-Zendesk-Webhook-Signature-Timestamp": timestamp,
    }


def signed_by_intercom(body: bytes) -> dict[str, str]:
    return {"X-Hub-Signature": f"sha1={hmac.digest(SECRET.encode(), body, hashlib.sha1).hex()}"}


@pytest.fixture
def service(fake: FakeOllama, tmp_path: Path) -> Iterator[ServiceProcess]:
    """The service with one key, in front of a model without faults."""
    fake.renew()
    settings = {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2", "API_KEYS": f"webhook:{KEY}"}
    with serve(tmp_path, **settings) as process:
        yield process


@dataclass
class Receiver:
    """A running example."""

    process: ForkedProcess
    port: int
    out: Path

    @property
    def said(self) -> str:
        return self.out.read_text()

    def send(self, payload: Any, headers: dict[str, str], method: str = "POST") -> int:
        """Send a webhook with a signature made beforehand; return the status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, "/webhook", json.dumps(payload).encode(), headers)
            return connection.getresponse().status
        finally:
            connection.close()

    def answers(self) -> bool:
        assert self.process.poll() is None, self.said
        try:
            return self.send({}, {}, "HEAD") == 200
        except OSError:
            return False

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.said)


@contextmanager
def receiver(name: str, service: ServiceProcess, folder: Path, *flags: str) -> Iterator[Receiver]:
    """Run ``examples/<name>_webhook.py`` in front of *service*."""
    port, out = free_port(), folder / "receiver.out"
    for file, content in (("secret", SECRET), ("key", KEY), ("token", "t0ken")):
        (folder / file).write_text(f"{content}\n")
    files = ["--secret-file", str(folder / "secret"), "--api-key-file", str(folder / "key")]
    command = [str(ROOT / f"examples/{name}_webhook.py"), *files, "--service", service.url, "--port", str(port), *flags]
    with ForkedProcess(command, service_environment(), folder, (out, out)) as process:
        running = Receiver(process, port, out)
        until(running.answers)
        yield running


class HelpDeskApi(BaseHTTPRequestHandler):
    """The API of a help desk: records each PUT."""

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.path, self.headers["Authorization"], body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def help_desk() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HelpDeskApi)
    server.received = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def asked(fake: FakeOllama, *lines: str) -> int:
    """Return how often the model was asked for the conversation of *lines*."""
    message = chat_messages("", "\n".join(lines))[-1]["content"]
    return int(fake.stats()["calls_by_sha"].get(text_sha256(message), 0))


def test_zendesk_ticket_is_labelled_once(
    service: ServiceProcess, fake: FakeOllama, help_desk: Any, tmp_path: Path
) -> None:
    """Only the first attempt of an event calls the model; no text is printed; nothing is written back without --write."""
    vendor_url = f"http://127.0.0.1:{help_desk.server_address[1]}"
    flags = ["--token-file", str(tmp_path / "token"), "--vendor-url", vendor_url]
    with receiver("zendesk", service, tmp_path, *flags) as example:
        event = zendesk_event("comment_added", **comment("We will look for it."))
        body = json.dumps(event).encode()
        for _ in range(2):
            assert example.send(event, signed_by_zendesk(body)) == 200
        until(lambda: example.said.count("dry run") == 2)
    assert help_desk.received == []
    assert fake.stats()["chat_requests"] == 1
    assert 'zendesk 5158: {"intent": ' in example.said
    assert f"PUT {vendor_url}/api/v2/tickets/5158/tags" in example.said
    assert "parcel" not in example.said
    assert "categorization" not in example.said
    assert asked(fake, "Customer: My parcel is three weeks late.", "Agent: We will look for it.") == 1


def test_webhook_without_a_valid_signature_is_refused(
    service: ServiceProcess, fake: FakeOllama, tmp_path: Path
) -> None:
    """No signature, one of another body, an old one; events that hold no new public text change nothing."""
    event = zendesk_event()
    body = json.dumps(event).encode()
    ignored = [
        zendesk_event("comment_added", **comment("internal", is_public=False)),
        zendesk_event("comment_added", **comment(str(TICKET["description"]), is_staff=False)),
        zendesk_event("status_changed", current="SOLVED", previous="OPEN"),
    ]
    with receiver("zendesk", service, tmp_path) as example:
        for headers in ({}, signed_by_zendesk(b"{}"), signed_by_zendesk(body, age_s=400), signed_by_intercom(body)):
            assert example.send(event, headers) == 401
        for each in ignored:
            assert example.send(each, signed_by_zendesk(json.dumps(each).encode())) == 200
        assert example.send([], signed_by_zendesk(b"[]")) == 422
        assert example.send("x" * 1_000_001, {}) == 413
    assert fake.stats()["chat_requests"] == 0
    assert "zendesk 5158" not in example.said


def test_intercom_conversation_is_labelled_and_written_back(
    service: ServiceProcess, fake: FakeOllama, help_desk: Any, tmp_path: Path
) -> None:
    """HTML is removed, notes are left out, the labels become custom attributes; a ping is answered."""
    flags = ["--write", "--token-file", str(tmp_path / "token"), "--vendor-url"]
    flags.append(f"http://127.0.0.1:{help_desk.server_address[1]}")
    with receiver("intercom", service, tmp_path, *flags) as example:
        ping = {"type": "notification_event", "topic": "ping", "id": "notif_1", "data": {"item": {"type": "ping"}}}
        assert example.send(ping, signed_by_intercom(json.dumps(ping).encode())) == 200
        notification = intercom_notification()
        assert example.send(notification, {}) == 401
        assert example.send(notification, signed_by_intercom(json.dumps(notification).encode())) == 200
        example.wait_for("intercom 215468100: labels written")
    [(path, authorization, change)] = help_desk.received
    assert (path, authorization) == ("/conversations/215468100", "Bearer t0ken")
    assert list(change["custom_attributes"]) == ["triad_intent", "triad_topic", "triad_sentiment"]
    customer = "Customer: Where is it & when does it come?\n    Thanks"
    assert asked(fake, "Customer: My parcel is three weeks late.", "Agent: We are sorry.", customer) == 1


def test_failed_call_is_reported_without_text(service: ServiceProcess, tmp_path: Path) -> None:
    """A wrong key: one line."""
    with receiver("zendesk", service, tmp_path) as example:
        (tmp_path / "key").write_text("wrong-key-0123456789\n")
        event = zendesk_event()
        assert example.send(event, signed_by_zendesk(json.dumps(event).encode())) == 200
        example.wait_for("zendesk 5158: failed, HTTPError, HTTP 401")
    assert "parcel" not in example.said
