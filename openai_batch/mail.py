"""Sends notifications by mail over SMTP; the only owner of smtplib."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import smtplib
import ssl
import threading
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Any

from pydantic import SecretStr

from domain.text import one_line
from error_handler import ConfigurationError, JobConnectionError
from utils.network import is_this_machine

TIMEOUT_S = 10.0  # per SMTP command
MAIL_TIMEOUT_S = 30.0  # per mail
TLS_PORT = 465  # encrypted from the first byte (RFC 8314)

_SERVER = re.compile(r"([A-Za-z0-9.-]{1,253}):(\d{1,5})")


class Mailbox:
    """One recipient and the mail server for it."""

    def __init__(self, to: str, server: str | None, login: SecretStr | None, sender: str | None) -> None:
        """*server* is host:port, *login* user:password; *sender* None means the recipient.

        Raises:
            ConfigurationError: One of them is malformed, or *server* is None.
        """
        found = _SERVER.fullmatch(server or "")
        if found is None or not 0 < int(found[2]) < 65536:
            raise ConfigurationError("NOTIFICATION_EMAIL needs SMTP_SERVER as host:port, such as mail.example.com:587.")
        self._host, self._port = found[1], int(found[2])
        self._to = _address("NOTIFICATION_EMAIL", to)
        self._from = _address("SMTP_FROM", sender or to)
        self._login = login

    async def send(self, payload: dict[str, Any]) -> None:
        """Send *payload*, one line per entry.

        Raises:
            JobConnectionError: The server has not accepted it within MAIL_TIMEOUT_S.
        """
        message = EmailMessage()
        message["Subject"] = one_line(f"Batch {payload['batch_id']}: {payload['status']}", 120)
        message["From"], message["To"] = self._from, self._to
        message.set_content("\n".join(f"{name}: {one_line(str(value), 500)}" for name, value in payload.items()))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str | None] = loop.create_future()

        def finish(problem: str | None) -> None:
            if not done.done():
                done.set_result(problem)

        def deliver() -> None:
            problem = None
            try:
                self._deliver(message)
            except (OSError, smtplib.SMTPException, MessageError, UnicodeError) as exc:
                problem = type(exc).__name__  # the server's own text may quote the login
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(finish, problem)

        # A daemon thread: the process would wait at its end for a thread of the pool that never ends.
        threading.Thread(target=deliver, name="mail", daemon=True).start()
        try:
            async with asyncio.timeout(MAIL_TIMEOUT_S):
                problem = await done
        except TimeoutError as exc:
            raise JobConnectionError(f"the mail server did not accept it within {MAIL_TIMEOUT_S:.0f} s") from exc
        if problem is not None:
            raise JobConnectionError(f"the mail server did not accept it ({problem})")

    def _deliver(self, message: EmailMessage) -> None:
        context = ssl.create_default_context()  # smtplib's own accepts every certificate
        is_encrypted = self._port == TLS_PORT
        connect = functools.partial(smtplib.SMTP_SSL, context=context) if is_encrypted else smtplib.SMTP
        with connect(self._host, self._port, timeout=TIMEOUT_S) as server:
            server.ehlo()
            if not is_encrypted and server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
                is_encrypted = True
            if self._login is not None:
                if not is_encrypted and not is_this_machine(self._host):
                    raise smtplib.SMTPNotSupportedError("no STARTTLS, and the password is not sent unencrypted")
                user, _, password = self._login.get_secret_value().partition(":")
                server.login(user, password)
            server.send_message(message)


def _address(name: str, text: str) -> Address:
    try:
        return Address(addr_spec=text)
    except (ValueError, MessageError, IndexError) as exc:
        raise ConfigurationError(f"{name} must be one mail address, name@host.") from exc
