"""One of several model servers: a client with its own breaker, window and limit, and what it has shown so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from async_llm_wrapper import AsyncLLMClient, SharedWindow
from classifier import Classifier
from config import Settings
from domain.conversation import Conversation, Outcome
from error_handler import ConfigurationError, LLMError, LLMTimeoutError, LLMUnavailableError
from model_server.breaker import BreakerPolicy, CircuitBreaker
from model_server.concurrency import ConcurrencyLimit
from model_server.protocol import ChatTarget
from model_server.window import Say, WindowChoice

CHECK_S = 4.0  # the longest time for a check of one server
NEW_SHARE = 0.2  # of the last answer in the mean time
FORGET_S = 60.0  # an older mean time counts as unknown


@dataclass(frozen=True, slots=True)
class Traits:
    """What has to be the same on all servers, beside the window; None if a server does not report it."""

    digest: str | None
    version: str | None

    def differences(self, first: Traits) -> list[str]:
        """Return in words how these traits differ from those of the *first* server."""
        pairs = (
            ("model digest", _short(self.digest), _short(first.digest)),
            ("version", self.version, first.version),
        )
        return [
            f"{name} {mine or 'unknown'} instead of {other or 'unknown'}"
            for name, mine, other in pairs
            if mine != other
        ]


class Server:
    """One server. *settings* name it alone, *most* are its calls in flight while there is no *limit*.

    *in_flight* and *answered* count conversations, *failures* those in a row that it failed although it is there. *error*
    is why it takes no calls, None if it does.
    """

    def __init__(self, settings: Settings, client: AsyncLLMClient, most: int, limit: ConcurrencyLimit | None) -> None:
        self.name = host_and_port(settings.server_url)
        self._settings = settings
        self.client = client
        self.window = SharedWindow(client, settings.ollama_num_ctx)
        self.in_flight = self.answered = 0
        self.error: LLMError | ConfigurationError | None = None
        self._most, self._limit = most, limit
        self._seconds: float | None = None
        self._measured_at = 0.0
        self.failures = 0

    def guard(self, probe: Callable[[], Awaitable[bool]], policy: BreakerPolicy) -> None:
        """Let *probe* decide whether the server takes calls. Call it once, before the first request."""
        self.client.breaker = CircuitBreaker(probe, policy)

    @property
    def is_ready(self) -> bool:
        """True if the server takes calls."""
        return not self.client.breaker.is_open

    @property
    def problem(self) -> str:
        """Why the server takes no calls, empty if it does. The server has its name there, because a path may hold a key."""
        told = "" if self.error is None else str(self.error)
        if not told and not self.is_ready:  # the breaker opens before the first probe
            told = self.client.breaker.problem
        return told.replace(self.client.target.address, self.name)

    @property
    def is_reachable(self) -> bool:
        """False if the server did not answer the last check."""
        return not isinstance(self.error, LLMUnavailableError)

    @property
    def most(self) -> int:
        """The calls that it may have in flight now."""
        return self._most if self._limit is None else self._limit.current

    def wait(self, now_s: float) -> tuple[bool, float, float]:
        """Return a key for the expected wait of one more call: the smallest one is the best server.

        A server with room comes first, so that no slot is idle. The wait is the outstanding work, weighted by the measured
        time and by the slots; a server that was not measured lately is tried.
        """
        calls = (self.in_flight + 1) / self.most
        is_known = self._seconds is not None and now_s - self._measured_at < FORGET_S
        return self.in_flight >= self.most, calls * (self._seconds or 0.0) if is_known else 0.0, calls

    async def check(self) -> Traits:
        """Find the model again, and return the traits.

        Raises:
            LLMError: The server does not answer within CHECK_S, or not as a model server.
            ConfigurationError: It does not have the model.
        """
        try:
            async with asyncio.timeout(CHECK_S):
                target = await self.client.prepare(self._settings)
                version = await self.client.version()
        except TimeoutError as exc:
            raise LLMTimeoutError(f"{self.name} did not answer within {CHECK_S:.0f} s") from exc
        return Traits(target.digest, version)

    async def load(self, choice: WindowChoice, say: Say) -> ChatTarget:
        """Load the model, keep the window that the server gives, and return the target. Raises as ``AsyncLLMClient.warm_up``."""
        target = await self.client.warm_up(choice, lambda sentence: say(f"{self.name}: {sentence}"))
        await self.window.close()
        self.window = SharedWindow(self.client, choice.asked, choice.given(target.num_ctx))
        return target

    async def classify(self, classifier: Classifier, conversation: Conversation, attempt: int) -> Outcome:
        """Return what ``SharedWindow.classify`` returns, and measure how long that takes.

        Raises:
            LLMElsewhereError: The server is away.
            LLMError, SkippedDocumentError: As ``ollama_classify_async``.
        """
        start_s = time.monotonic()
        self.in_flight += 1
        try:
            outcome = await self.window.classify(classifier, conversation, attempt)
        except asyncio.CancelledError:  # a caller of the service gave up, perhaps because the server hangs
            if time.monotonic() - start_s > (self._seconds or 0.0):
                self.measure(time.monotonic() - start_s, time.monotonic())
            raise
        except LLMUnavailableError:
            self.failures += 1
            self.measure(time.monotonic() - start_s, time.monotonic())
            raise
        finally:
            self.in_flight -= 1
        self.failures = 0
        self.answered += 1
        self.measure(time.monotonic() - start_s, time.monotonic())
        return outcome

    def state(self) -> dict[str, Any]:
        """Return the state for people and programs: never an address with a path or a secret.

        *state* is ready, away (no answer), or left_out (*problem* says why). *seconds* is the mean time of a conversation.
        """
        state = "ready" if self.is_ready else "left_out" if self.is_reachable else "away"
        return {
            "server": self.name,
            "state": state,
            "is_ready": self.is_ready,
            "in_flight": self.in_flight,
            "limit": self.most,
            "answered": self.answered,
            "seconds": None if self._seconds is None else round(self._seconds, 3),
            "problem": "" if self.is_ready else self.problem,
        }

    async def close(self) -> None:
        """Stop a load and the probe. Cancel calls before."""
        await self.window.close()
        await self.client.breaker.close()

    def measure(self, seconds: float, now_s: float) -> None:
        """Note that a conversation took *seconds*, whether it was answered or not."""
        if self._seconds is None or now_s - self._measured_at >= FORGET_S:
            self._seconds = seconds
        else:
            self._seconds += NEW_SHARE * (seconds - self._seconds)
        self._measured_at = now_s


def host_and_port(url: str) -> str:
    """Return the name under which the server at *url* is shown."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest.removeprefix("sha256:")[:12]
