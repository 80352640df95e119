"""Notifies a webhook and a mail address of each batch that ends, in the background of the run.

The run never waits for a notification and never fails because of one. A payload holds ids and counts, and no text of
a document. The only owner of smtplib.

The webhook's address comes from the settings, never from a document. Each connection resolves and checks it once and
connects to that very result, so that DNS rebinding cannot redirect it. Redirects are not followed, and only the status
of the response is read.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import hashlib
import hmac
import logging
import re
import smtplib
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
from pydantic import SecretStr

from domain.text import one_line
from error_handler import ConfigurationError, JobConnectionError, JobError, JobValidationError
from network.addresses import is_this_machine
from network.guarded_resolver import GuardedResolver, is_allowed, literal_address
from network.outgoing import aiohttp_session, problem_of, route_to, trusted_certificates
from openai_batch.job_config import NotificationConfig
from openai_batch.ledger import ItemState, Shard
from utils.retry_utils import RetryPolicy, retry_async

logger = logging.getLogger(__name__)

QUEUE_SIZE = 100
POLICY = RetryPolicy(attempts=4, first_wait_s=1.0)
CLOSING_S = 15.0  # how long the end of a run waits for the rest of the queue
TIMEOUT_S = 10.0  # per POST, from the lookup to the status; per SMTP command
MAIL_TIMEOUT_S = 30.0  # per mail
TLS_PORT = 465  # encrypted from the first byte (RFC 8314)

_SERVER = re.compile(r"([A-Za-z0-9.-]{1,253}):(\d{1,5})")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")  # libraries disagree on other characters
_MAY_CHANGE = frozenset({408, 425, 429})

Payload = dict[str, Any]


def payload_of(shard: Shard, counts: Mapping[ItemState, int], retried: int) -> Payload:
    """Return the payload for an applied *shard*, *retried* of whose documents are pending again.

    Keys: batch_id, status (completed, failed, or retried if documents are sent again), total, succeeded,
    failed, timestamp (ISO 8601, UTC), error_summary (counts by kind of error, None if there is none).
    """
    succeeded = counts[ItemState.OK]
    wrong = [f"{count} {state}" for state, count in counts.items() if count and state is not ItemState.OK]
    status = "completed" if not wrong else "retried" if retried else "failed" if not succeeded else "completed"
    return {
        "batch_id": shard.batch_id,
        "status": status,
        "total": shard.lines,
        "succeeded": succeeded,
        "failed": shard.lines - succeeded,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "error_summary": ", ".join(wrong) or None,
    }


class Notifier:
    """Sends payloads in the background, one at a time to each channel. Use as ``async with``.

    The end of the block waits *closing_s* for the rest. *dropped* counts payloads that found QUEUE_SIZE others waiting,
    *given_up* those that no attempt could deliver.
    """

    def __init__(
        self, channels: Sequence[Channel], *, policy: RetryPolicy = POLICY, closing_s: float = CLOSING_S
    ) -> None:
        self._policy = policy
        self._closing_s = closing_s
        self._lanes = [(channel, asyncio.Lock(), set[asyncio.Task[None]]()) for channel in channels]
        self.dropped = self.given_up = 0

    async def __aenter__(self) -> Notifier:
        return self

    async def __aexit__(self, *_: object) -> None:
        waiting = [task for _channel, _lock, tasks in self._lanes for task in tasks]
        late = (await asyncio.wait(waiting, timeout=self._closing_s))[1] if waiting else set()
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if late or self.dropped or self.given_up:
            counts = (self.given_up, self.dropped, len(late))
            logger.warning("undelivered notifications: %d given up, %d dropped, %d unsent at the end", *counts)

    def notify(self, payload: Payload) -> None:
        """Begin to send *payload* to every channel; drop and count it if too many are waiting."""
        for channel, lock, tasks in self._lanes:
            if len(tasks) >= QUEUE_SIZE:
                self.dropped += 1
            else:
                task = asyncio.create_task(self._send(channel, lock, payload))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def _send(self, channel: Channel, lock: asyncio.Lock, payload: Payload) -> None:
        what = f"notification of batch {payload['batch_id']}"
        async with lock:
            try:
                await retry_async(functools.partial(channel.send, payload), self._policy, what)
            except JobError as exc:
                self.given_up += 1
                logger.warning("%s given up: %s", what, exc)


class Mailbox:
    """One recipient and the mail server for it."""

    def __init__(self, to: str, server: str | None, login: SecretStr | None, sender: str | None) -> None:
        """*server* is host:port, *login* user:password; *sender* None means the recipient.

        Raises ConfigurationError if one of them is malformed, *server* is None, or SSL_CERT_FILE cannot be read.
        """
        found = _SERVER.fullmatch(server or "")
        if found is None or not 0 < int(found[2]) < 65536:
            raise ConfigurationError("NOTIFICATION_EMAIL needs SMTP_SERVER as host:port, such as mail.example.com:587.")
        self._host, self._port = found[1], int(found[2])
        self._to = _mail_address("NOTIFICATION_EMAIL", to)
        self._from = _mail_address("SMTP_FROM", sender or to)
        self._login = login
        self._tls = trusted_certificates()  # smtplib's own context accepts every certificate

    async def send(self, payload: Payload) -> None:
        """Send *payload*, one line per entry; raise JobConnectionError if that takes longer than MAIL_TIMEOUT_S."""
        message = EmailMessage()
        message["Subject"] = one_line(f"Batch {payload['batch_id']}: {payload['status']}", 120)
        message["From"], message["To"] = self._from, self._to
        message.set_content("\n".join(f"{name}: {one_line(str(value), 500)}" for name, value in payload.items()))
        sent: concurrent.futures.Future[None] = concurrent.futures.Future()
        sent.set_running_or_notify_cancel()  # so that nobody can cancel it
        # A daemon thread: the process would wait at its end for a thread of the pool that never ends.
        threading.Thread(target=self._deliver, args=(message, sent), name="mail", daemon=True).start()
        try:
            async with asyncio.timeout(MAIL_TIMEOUT_S):
                await asyncio.wrap_future(sent)
        except (OSError, smtplib.SMTPException, MessageError, UnicodeError) as exc:
            # Only the class: the server's own text may quote the login.
            raise JobConnectionError(f"the mail server did not accept it ({type(exc).__name__})") from None

    def _deliver(self, message: EmailMessage, sent: concurrent.futures.Future[None]) -> None:
        try:
            self._submit(message)
            sent.set_result(None)
        except (OSError, smtplib.SMTPException, MessageError, UnicodeError) as exc:
            sent.set_exception(exc)

    def _submit(self, message: EmailMessage) -> None:
        is_encrypted = self._port == TLS_PORT
        connect = functools.partial(smtplib.SMTP_SSL, context=self._tls) if is_encrypted else smtplib.SMTP
        with connect(self._host, self._port, timeout=TIMEOUT_S) as server:
            server.ehlo()
            if not is_encrypted and server.has_extn("starttls"):
                server.starttls(context=self._tls)
                is_encrypted = True
            if self._login is not None:
                if not is_encrypted and not is_this_machine(self._host):
                    raise smtplib.SMTPNotSupportedError("no STARTTLS, and the password is not sent unencrypted")
                user, _, password = self._login.get_secret_value().partition(":")
                server.login(user, password)
            server.send_message(message)


def _mail_address(name: str, text: str) -> Address:
    try:
        return Address(addr_spec=text)
    except (ValueError, MessageError, IndexError) as exc:
        raise ConfigurationError(f"{name} must be one mail address, name@host.") from exc


def signature(secret: str, at: int, body: bytes) -> str:
    """Return the ``X-Signature`` header for *body* sent *at* (unix seconds): ``t=AT,v1=HEX``."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Webhook:
    """One URL that receives POSTs; with *secret* they are signed."""

    def __init__(self, url: SecretStr, secret: SecretStr | None) -> None:
        """Check *url*; raise ConfigurationError if it is malformed or not allowed."""
        require_webhook(url.get_secret_value())
        self._url, self._secret = url, secret
        self._options = route_to(url.get_secret_value()).options

    async def send(self, payload: Payload) -> None:
        """Post *payload* as JSON.

        Raises JobConnectionError if there is no response within TIMEOUT_S, or one that a retry may change;
        JobValidationError if the receiver refused it, or its address is not allowed.
        """
        body = orjson.dumps(payload)
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            headers["X-Signature"] = signature(self._secret.get_secret_value(), int(time.time()), body)
        url, timeout = self._url.get_secret_value(), aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(resolver=GuardedResolver(), use_dns_cache=False, force_close=True)
        try:
            async with (
                aiohttp_session(connector) as session,
                session.post(url, data=body, headers=headers, timeout=timeout, **self._options) as answer,
            ):
                status = answer.status
                answer.close()
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # a timeout is an OSError
            # Only the class: the error's text holds the URL, and URLs hold tokens.
            known = problem_of(exc, url)  # names the host only
            raise JobConnectionError(known or f"the webhook did not respond ({type(exc).__name__})") from exc
        if 300 <= status < 500 and status not in _MAY_CHANGE:
            raise JobValidationError(f"the webhook refused it (HTTP {status})")
        if not 200 <= status < 300:
            raise JobConnectionError(f"the webhook failed (HTTP {status})")


def require_webhook(url: str) -> None:
    """Raise ConfigurationError if *url* is not a plain http(s) URL, or its address is not allowed."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.fragment or port == 0:
        raise ConfigurationError(
            "NOTIFICATION_WEBHOOK must be http(s)://host[:port][/path], without user and password."
        )
    literal = literal_address(host)
    if literal is not None:
        if not is_allowed(host, literal):
            raise ConfigurationError("NOTIFICATION_WEBHOOK has an address that is not allowed; use the receiver's own.")
    elif not _HOST.fullmatch(host) or _is_disguised(host):
        raise ConfigurationError("NOTIFICATION_WEBHOOK: write the host as a name, as 192.0.2.1 or as [2001:db8::1].")


def _is_disguised(host: str) -> bool:
    """Return whether the system reads *host* as an IPv4 address, such as 0x7f000001, 2130706433 or 127.1."""
    try:
        return bool(socket.inet_aton(host))
    except OSError:
        return False


Channel = Webhook | Mailbox


def channels_of(config: NotificationConfig) -> list[Channel]:
    """Return the channels that *config* names; raise ConfigurationError if an address cannot be used."""
    channels: list[Channel] = []
    if config.webhook_url is not None:
        channels.append(Webhook(config.webhook_url, config.webhook_secret))
    if config.email is not None:
        channels.append(Mailbox(config.email, config.smtp_server, config.smtp_login, config.smtp_from))
    return channels
