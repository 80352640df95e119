"""Notifications to a real HTTP server and a real SMTP server, which cannot disturb the run."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from pydantic import SecretStr

from error_handler import ConfigurationError, JobConnectionError, JobValidationError
from openai_batch import notifications
from openai_batch.job_config import NotificationConfig
from openai_batch.notifications import QUEUE_SIZE, Mailbox, Notifier, Payload, Webhook, channels_of, require_webhook
from tests.fakes.fake_openai import FakeOpenAI
from tests.fakes.webhook_receiver import Canary, Receiver, flood, hang, receiving, status, trickle
from tests.openai_batch.openai_job import END_S, Job
from utils.retry_utils import RetryPolicy

KEYS = ["batch_id", "status", "total", "succeeded", "failed", "timestamp", "error_summary"]
FAST = RetryPolicy(attempts=3, first_wait_s=0.01)
SECRET = "a-key-of-32-characters-or-more-ok"


def payload(number: int = 1) -> Payload:
    values = (f"batch_{number}", "completed", 10, 10, 0, "2026-11-21T12:00:00+00:00", None)
    return dict(zip(KEYS, values, strict=True))


def webhook_of(url: str, secret: SecretStr | None = None) -> Webhook:
    return Webhook(SecretStr(url), secret)


@pytest.fixture
def canary() -> Iterator[Canary]:
    listener = Canary()
    yield listener
    listener.close()


class Letterbox:
    """Keeps what a real SMTP server was given."""

    def __init__(self) -> None:
        self.letters: list[tuple[Session, EmailMessage]] = []
        self.arrived = asyncio.Event()
        self.logins: list[tuple[bytes, bytes, bool]] = []

    async def handle_DATA(  # noqa: N802 - the name of the package
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        raw = envelope.content if isinstance(envelope.content, bytes) else b""
        message = message_from_bytes(raw, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.letters.append((session, message))
        self.arrived.set()
        return "250 OK"

    def authenticate(self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login, data.password, session.ssl is not None))
        return AuthResult(success=data.password == b"right")


@asynccontextmanager
async def letterbox(**options: Any) -> AsyncIterator[tuple[Letterbox, str]]:
    """Serve SMTP on this machine; yields the box and host:port."""
    box = Letterbox()
    loop = asyncio.get_running_loop()
    made = lambda: SMTP(box, loop=loop, authenticator=box.authenticate, hostname="test", **options)  # noqa: E731
    server = await loop.create_server(made, "127.0.0.1", 0)
    try:
        yield box, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def test_run_notifies_of_completed_retried_and_failed_batches(job: Job, openai: FakeOpenAI) -> None:
    """With exactly these keys, counts that add up, no text and no secret."""
    job.fill(20, text="CANARY-TEXT")
    openai.configure(
        faults=[
            {"kind": "line_status", "status": 500, "when": {"batches": [0], "from": 1, "to": 2}},
            {"kind": "line_status", "status": 400, "message": "CANARY-TEXT", "when": {"batches": [2]}},
        ]
    )
    with receiving() as receiver:
        changes = {"NOTIFICATION_WEBHOOK": receiver.url, "NOTIFICATION_WEBHOOK_SECRET": "CANARY-SECRET"}
        ended = job.cli("run", "--verbose", **changes)
    assert ended.code == 1, ended.err
    assert [list(told) for told in receiver.payloads] == [KEYS] * 3
    facts = [(told["status"], told["total"], told["succeeded"], told["failed"]) for told in receiver.payloads]
    assert facts == [("retried", 10, 8, 2), ("completed", 10, 10, 0), ("failed", 2, 0, 2)]
    assert [told["error_summary"] for told in receiver.payloads] == ["2 failed", None, "2 failed"]
    assert {told["batch_id"] for told in receiver.payloads} == {batch["id"] for batch in openai.batches()}
    assert b"CANARY" not in b"".join(body + repr(headers).encode() for headers, body in receiver.received)
    assert "CANARY" not in ended.out + ended.err


async def test_signature_verifies() -> None:
    """With the recipe of docs/openai-batch.md."""
    with receiving() as receiver:
        before = int(time.time())
        await webhook_of(receiver.url, secret=SecretStr(SECRET)).send(payload())
    headers, body = receiver.received[0]
    at, given = (part.split("=", 1)[1] for part in headers["X-Signature"].split(","))
    made = hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(made, given)
    assert before <= int(at) <= time.time()
    forged = hmac.new(SECRET.encode(), f"{at}.".encode() + body + b" ", hashlib.sha256).hexdigest()
    assert forged != given
    with receiving() as receiver:
        await webhook_of(receiver.url).send(payload())
    assert "X-Signature" not in receiver.received[0][0]


async def told(receiver: Receiver, **options: Any) -> Notifier:
    async with Notifier([webhook_of(receiver.url)], policy=FAST, **options) as notifier:
        notifier.notify(payload())
    return notifier


async def test_server_errors_are_retried_a_few_times() -> None:
    """Then the payload is given up."""
    with receiving(status(500), status(503), status(204)) as receiver:
        assert (await told(receiver)).given_up == 0
    assert len(receiver.received) == 3
    with receiving(status(500)) as receiver:
        assert (await told(receiver)).given_up == 1
    assert len(receiver.received) == FAST.attempts


@pytest.mark.parametrize("code", [400, 401, 404, 410])
async def test_refusals_are_not_retried(code: int) -> None:
    """The receiver would refuse again."""
    with receiving(status(code)) as receiver:
        assert (await told(receiver)).given_up == 1
    assert len(receiver.received) == 1


@pytest.mark.parametrize("code", [301, 302, 307, 308])
async def test_redirects_are_not_followed(code: int, canary: Canary) -> None:
    """They could lead to the cloud's metadata."""
    with receiving(status(code, Location=f"http://127.0.0.1:{canary.port}/latest/meta-data")) as receiver:
        assert (await told(receiver)).given_up == 1
    assert canary.visits() == 0


async def test_response_body_is_not_read() -> None:
    """2 GB of it: the status counts, and the connection is closed."""
    with receiving(flood) as receiver:
        assert (await told(receiver)).given_up == 0
        assert await asyncio.to_thread(receiver.cut_off.wait, 30), "the receiver still sends"
    assert receiver.flooded < 100_000_000


@pytest.mark.parametrize("behaviour", [hang, trickle])
async def test_deadline_covers_the_whole_response(behaviour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if bytes trickle."""
    monkeypatch.setattr(notifications, "TIMEOUT_S", 0.3)
    with receiving(behaviour) as receiver:
        assert (await told(receiver)).given_up == 1
        assert len(receiver.received) == FAST.attempts


async def test_closing_waits_no_longer_than_its_limit() -> None:
    """Also while the webhook hangs; no task is left behind."""
    with receiving(hang) as receiver:
        threads = set(asyncio.all_tasks())
        await told(receiver, closing_s=0.2)
        assert not receiver.released.is_set()
        assert set(asyncio.all_tasks()) == threads
    assert len(receiver.received) == 1


def greet_for_ever(listener: socket.socket, released: threading.Event) -> None:
    """An SMTP greeting without end, a line at a time: each one resets the time-out of a socket."""
    connection, _ = listener.accept()
    with connection, suppress(OSError):
        while not released.wait(0.1):
            connection.sendall(b"220-wait\r\n")


@contextmanager
def endless_mail_server() -> Iterator[str]:
    """Yield its address; it greets, and greets, and greets."""
    released = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet_for_ever, args=(listener, released))
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            released.set()
            thread.join()


@pytest.mark.thorough
def test_run_ends_while_webhook_or_mail_server_hangs(
    mongodb_uri: str, db_name: str, tmp_path: Path, openai: FakeOpenAI
) -> None:
    """All documents are completed. Each run waits for its receiver up to the limit, so the runs are concurrent."""
    behaviours = {"hang": hang, "trickle": trickle, "flood": flood, "status 500": status(500)}
    with ExitStack() as stack:
        receivers = {name: stack.enter_context(receiving(behaviour)) for name, behaviour in behaviours.items()}
        changes = {name: {"NOTIFICATION_WEBHOOK": receiver.url} for name, receiver in receivers.items()}
        server = stack.enter_context(endless_mail_server())
        changes["mail"] = {"NOTIFICATION_EMAIL": "ops@example.com", "SMTP_SERVER": server}
        running = {}
        for name, settings in changes.items():
            folder = tmp_path / name.replace(" ", "_")
            folder.mkdir()
            job = stack.enter_context(Job(mongodb_uri, db_name, openai.url, folder, collection=folder.name))
            job.fill(20)
            running[name] = (job, stack.enter_context(job.started("run", **settings)))
        for name, (job, process) in running.items():
            _, err = process.communicate(timeout=END_S)
            assert process.returncode == 0, (name, err)
            assert job.statuses() == {"completed": 20}, name
            # A flood is cut off, and its status was 200.
            assert ("undelivered notifications" in err) is (name != "flood"), (name, err)
        assert not any(receiver.released.is_set() for receiver in receivers.values())
        assert all(receiver.received for receiver in receivers.values())


async def test_hanging_webhook_does_not_delay_mail() -> None:
    """Each channel has a separate queue."""
    async with letterbox() as (box, server):
        with receiving(hang) as receiver:
            ways = [webhook_of(receiver.url), Mailbox("ops@example.com", server, None, None)]
            async with Notifier(ways, closing_s=0.5) as notifier:
                notifier.notify(payload())
                async with asyncio.timeout(30):
                    await box.arrived.wait()
                assert receiver.received
    assert len(box.letters) == 1


async def test_full_queue_drops_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    """notify never waits."""
    with receiving(hang) as receiver:
        async with Notifier([webhook_of(receiver.url)], closing_s=0.1) as notifier:
            for number in range(QUEUE_SIZE + 7):
                notifier.notify(payload(number))
        assert notifier.dropped == 7
    assert "7 dropped" in caplog.text


REFUSED = [
    "http://169.254.169.254/latest/meta-data",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1%25lo]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::]:{port}/",
    "http://224.0.0.1:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://１２７.０.０.１:{port}/",
    "http://127。0。0。1:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://user:password@127.0.0.1:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.com/",
    "http://127.0.0.1%2f:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "127.0.0.1:{port}",
    "http://",
    "http://127.0.0.1:{port}/#fragment",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:99999/",
    "http://[127.0.0.1/",
]


@pytest.mark.parametrize("form", REFUSED)
def test_forbidden_webhook_urls_are_refused(form: str, canary: Canary) -> None:
    """The settings are refused when they are read. No connection is made, and the message does not show the address."""
    url = form.format(port=canary.port)
    with pytest.raises(ConfigurationError) as caught:
        channels_of(NotificationConfig(webhook_url=SecretStr(url)))
    assert str(caught.value).startswith("NOTIFICATION_WEBHOOK")
    assert "127.0.0.1" not in str(caught.value)
    assert canary.visits() == 0


@pytest.mark.parametrize(
    "url", ["https://hooks.example.com/a/b?c=d", "http://10.1.2.3:8080/", "http://[fd12::1]/x", "http://localhost:1/"]
)
def test_allowed_webhook_urls_are_accepted(url: str) -> None:
    """Private networks, and this machine under its own name."""
    require_webhook(url)


class Turning:
    """A name server that gives one answer after the other, the last one for ever."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        kind = socket.AF_INET6 if ":" in answer else socket.AF_INET
        return [{"hostname": host, "host": answer, "port": port, "family": kind, "proto": 0, "flags": 0}]


@pytest.mark.parametrize("answer", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "100.100.100.200"])
async def test_name_that_resolves_to_this_machine_is_refused(
    answer: str, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is connected to."""
    names = Turning(answer)
    monkeypatch.setattr(ThreadedResolver, "resolve", names.resolve)
    hook = webhook_of(f"http://hooks.example.com:{canary.port}/")
    with pytest.raises(JobValidationError, match="not allowed"):
        await hook.send(payload())
    assert names.asked == 1
    assert canary.visits() == 0


async def test_checked_address_is_the_connected_one(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is resolved once per POST."""
    monkeypatch.setattr(notifications, "TIMEOUT_S", 0.5)
    names = Turning("192.0.2.1", "127.0.0.1")  # a documentation address; nobody is there
    monkeypatch.setattr(ThreadedResolver, "resolve", names.resolve)
    with pytest.raises(JobConnectionError):
        await webhook_of(f"http://hooks.example.com:{canary.port}/").send(payload())
    assert names.asked == 1
    assert canary.visits() == 0


async def test_mail_has_subject_addresses_and_payload() -> None:
    """One line per entry."""
    async with letterbox() as (box, server):
        await Mailbox("ops@example.com", server, None, "triad@example.com").send(payload())
    _, message = box.letters[0]
    assert (message["To"], message["From"]) == ("ops@example.com", "triad@example.com")
    assert message["Subject"] == "Batch batch_1: completed"
    assert [line.partition(":")[0] for line in message.get_content().splitlines()] == KEYS


async def test_payload_cannot_inject_headers() -> None:
    """The id of a batch comes from a server."""
    async with letterbox() as (box, server):
        bad = payload() | {"batch_id": "x\r\nBcc: all@example.com\r\n\r\nbody", "error_summary": "a\r\n.\r\nQUIT"}
        await Mailbox("ops@example.com", server, None, None).send(bad)
    _, message = box.letters[0]
    assert message["Bcc"] is None
    assert len(message.get_content().splitlines()) == len(KEYS)
    assert len(box.letters) == 1


@pytest.mark.parametrize(
    "parts",
    [
        {"email": "a@example.com\nBcc: b@example.com"},
        {"email": "a@example.com, b@example.com"},
        {"email": "nobody"},
        {"smtp_from": "a@example.com\r\nX: y"},
        {"smtp_server": "host"},
        {"smtp_server": "host:0"},
        {"smtp_server": "host:99999"},
        {"smtp_server": "ho st:25"},
        {"smtp_server": None},
    ],
)
def test_unusable_mail_settings_are_refused(parts: dict[str, Any]) -> None:
    """Also if a schema file brings them."""
    given = {"email": "ops@example.com", "smtp_server": "localhost:25"} | parts
    with pytest.raises(ConfigurationError, match=r"SMTP|EMAIL"):
        channels_of(NotificationConfig(**given))


def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.thorough
async def test_login_goes_through_starttls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server offers it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with letterbox(tls_context=server_side(certificate)) as (box, server):
        await Mailbox("ops@example.com", server, SecretStr("triad:right"), None).send(payload())
        assert box.logins == [(b"triad", b"right", True)]
        session, _ = box.letters[0]
        assert session.ssl is not None
        monkeypatch.setattr(
            notifications, "TIMEOUT_S", 4.0
        )  # smtplib tries another way to log in, which the server ignores
        with pytest.raises(JobConnectionError, match=r"SMTPAuthenticationError|SMTPServerDisconnected") as caught:
            await Mailbox("ops@example.com", server, SecretStr("triad:CANARY"), None).send(payload())
    assert "CANARY" not in str(caught.value)
    assert len(box.letters) == 1


async def test_unsigned_certificate_is_refused(certificate: Path) -> None:
    """A man in the middle gets neither password nor mail."""
    async with letterbox(tls_context=server_side(certificate)) as (box, server):
        with pytest.raises(JobConnectionError, match="SSLCertVerificationError"):
            await Mailbox("ops@example.com", server, SecretStr("triad:right"), None).send(payload())
        assert (box.logins, box.letters) == ([], [])


async def test_password_is_not_sent_unencrypted() -> None:
    """Except on this machine: an attacker may have removed STARTTLS from the reply."""
    name = socket.gethostname()
    async with letterbox(auth_require_tls=False) as (box, server):
        await Mailbox("ops@example.com", server, SecretStr("triad:right"), None).send(payload())
        assert len(box.logins) == 1
        if socket.gethostbyname(name) != "127.0.0.1":
            pytest.skip("this machine's name does not lead to its loopback address")
        elsewhere = server.replace("127.0.0.1", name)
        with pytest.raises(JobConnectionError, match="SMTPNotSupportedError"):
            await Mailbox("ops@example.com", elsewhere, SecretStr("triad:right"), None).send(payload())
        assert len(box.logins) == 1


async def test_log_has_no_webhook_url_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever knows the URL can post."""
    caplog.set_level(logging.DEBUG)
    ways = channels_of(
        NotificationConfig(
            webhook_url=SecretStr("http://127.0.0.1:1/CANARY-URL"),
            webhook_secret=SecretStr("CANARY-SECRET"),
            email="ops@example.com",
            smtp_server="127.0.0.1:1",
            smtp_login=SecretStr("user:CANARY-PASSWORD"),
        )
    )
    async with Notifier(ways, policy=FAST) as notifier:
        notifier.notify(payload())
    assert notifier.given_up == 2
    assert "attempt 2 failed" in caplog.text
    assert "given up" in caplog.text
    assert "CANARY" not in caplog.text
