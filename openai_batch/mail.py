"""Notifications by mail, over SMTP; the only owner of smtplib."""

from __future__ import annotations

import asyncio
import contextlib
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

TIMEOUT_S = 10.0  # of one step of the dialogue
MAIL_TIMEOUT_S = 30.0  # of the whole of it
TLS_PORT = 465  # encrypted from the first byte (RFC 8314)

_SERVER = re.compile(r"([A-Za-z0-9.-]{1,253}):(\d{1,5})")


class Mailbox:
    """One address that gets mails through one server."""

    def __init__(self, to: str, server: str | None, login: SecretStr | None, sender: str | None) -> None:
        """*server* is host:port, *login* user:password, *sender* None the recipient itself.

        Raises:
            ConfigurationError: One of them is malformed, or there is no server.
        """
        if server is None:
            raise ConfigurationError("NOTIFICATION_EMAIL needs SMTP_SERVER, as host:port.")
        found = _SERVER.fullmatch(server)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ConfigurationError("SMTP_SERVER must be host:port, such as mail.example.com:587.")
        self._host, self._port = found[1], int(found[2])
        self._to = _address("NOTIFICATION_EMAIL", to)
        self._from = _address("SMTP_FROM", sender or to)
        self._login = login

    async def send(self, payload: dict[str, Any]) -> None:
        """Send *payload*, one line for each of its entries.

        Raises:
            JobConnectionError: The server has not taken it within MAIL_TIMEOUT_S.
        """
        message = EmailMessage()
        message["Subject"] = one_line(f"Batch {payload['batch_id']}: {payload['status']}", 120)
        message["From"], message["To"] = self._from, self._to
        message.set_content("\n".join(f"{name}: {one_line(str(value), 500)}" for name, value in payload.items()))
        try:
            async with asyncio.timeout(MAIL_TIMEOUT_S):
                problem = await self._in_thread(message)
        except TimeoutError as exc:
            raise JobConnectionError(f"the mail server has not taken it within {MAIL_TIMEOUT_S:.0f} s") from exc
        if problem is not None:
            # The server's own text is left out: it may quote the login.
            raise JobConnectionError(f"the mail server does not take it ({type(problem).__name__})") from problem

    async def _in_thread(self, message: EmailMessage) -> Exception | None:
        """Deliver in a thread that the process does not wait for at its end, as it would for one of a pool."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Exception | None] = loop.create_future()

        def note(problem: Exception | None) -> None:
            if not done.done():
                done.set_result(problem)

        def deliver() -> None:
            problem: Exception | None = None
            try:
                self._deliver(message)
            except (OSError, smtplib.SMTPException, MessageError, UnicodeError) as exc:
                problem = exc
            with contextlib.suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                loop.call_soon_threadsafe(note, problem)

        threading.Thread(target=deliver, name="mail", daemon=True).start()
        return await done

    def _deliver(self, message: EmailMessage) -> None:
        # smtplib's own contexts trust every certificate.
        context = ssl.create_default_context()
        if self._port == TLS_PORT:
            with smtplib.SMTP_SSL(self._host, self._port, timeout=TIMEOUT_S, context=context) as server:
                self._talk(server, message, is_encrypted=True)
            return
        with smtplib.SMTP(self._host, self._port, timeout=TIMEOUT_S) as server:
            server.ehlo()
            is_encrypted = server.has_extn("starttls")
            if is_encrypted:
                server.starttls(context=context)
                server.ehlo()
            self._talk(server, message, is_encrypted=is_encrypted)

    def _talk(self, server: smtplib.SMTP, message: EmailMessage, *, is_encrypted: bool) -> None:
        if self._login is not None:
            if not is_encrypted and not is_this_machine(self._host):
                raise smtplib.SMTPNotSupportedError("no STARTTLS: the password is not sent in clear")
            user, _, password = self._login.get_secret_value().partition(":")
            server.login(user, password)
        server.send_message(message)


def _address(name: str, text: str) -> Address:
    try:
        return Address(addr_spec=text)
    except (ValueError, MessageError, IndexError) as exc:
        raise ConfigurationError(f"{name} must be one mail address, name@host.") from exc
