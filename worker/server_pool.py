"""Several model servers with one model, used as one: each conversation goes to the one with the shortest expected wait.

A conversation stays on its server, so that a repair turn finds its prompt in the cache there. docs/scaling.md describes
what happens to servers that fail or differ.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

from async_llm_wrapper import AsyncLLMClient, open_session
from classifier import Classifier
from config import Settings
from domain.conversation import Conversation, Outcome
from error_handler import (
    ConfigurationError,
    LLMElsewhereError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    LLMUnavailableError,
)
from model_server.breaker import BreakerPolicy
from model_server.concurrency import ConcurrencyLimit
from model_server.models import chat_target
from model_server.protocol import ChatReply, ChatTarget
from model_server.window import Say, WindowChoice, choose_window
from worker.pool_server import Server, Traits

MOVES = 5  # servers that one conversation may lose; after that it may be the cause, and the attempt counts
FREE = 2  # connections of each server for its checks, which must not wait for those of one that hangs
FAILURES = 5  # conversations in a row that fail on one server, which then takes no calls until its probe succeeds
POLICY = BreakerPolicy(probe_cap_s=5.0, outage_limit_s=math.inf, has_others=True)
TAKEN_OUT = "model server %s takes no calls until that changes: %s"

logger = logging.getLogger(__name__)


class ServerPool:
    """The model servers of a run or a service, used there like one AsyncLLMClient and one SharedWindow. Use ``open_pool``.

    The first server that answers sets model, version and window. Another one takes calls only if it has the same, unless
    the settings allow mixed models. With *fails_fast*, no call waits while no server takes calls.
    """

    def __init__(self, settings: Settings, servers: Sequence[Server], *, fails_fast: bool = False) -> None:
        self.servers = tuple(servers)
        self._settings = settings
        self._fails_fast = fails_fast
        self._first: Server | None = None  # whose traits the others must have
        self._traits: Traits | None = None
        self._choice: WindowChoice | None = None
        self._window: int | None = None  # the least of all servers, in tokens, once one has loaded the model
        self._wanted: int | None = None  # the window that they are asked for, which may be larger
        self._classifiers: dict[tuple[Classifier, str | None], Classifier] = {}
        self._held = 0
        self._freed = asyncio.Condition()
        seen: Counter[str] = Counter()
        for server in self.servers:
            server.guard(partial(self._takes_calls, server), POLICY)
            seen[server.name] += 1
            if seen[server.name] > 1:  # one proxy for several servers
                server.name += f"#{seen[server.name]}"

    @property
    def breaker(self) -> ServerPool:
        """The pool itself: it is open and closed as a breaker is."""
        return self

    @property
    def is_open(self) -> bool:
        """True if no server takes calls."""
        return not self.ready

    @property
    def ready(self) -> list[Server]:
        """The servers that take calls."""
        return [server for server in self.servers if server.is_ready]

    @property
    def current(self) -> int:
        """The calls that may be in flight on all servers now; 1 if none takes calls, so that one call waits for a server."""
        return sum(server.most for server in self.ready) or 1

    @property
    def target(self) -> ChatTarget:
        """The target on the server that set the model."""
        return (self._first or self.servers[0]).client.target

    @property
    def targets(self) -> list[ChatTarget]:
        """The targets on the servers that take calls."""
        return [server.client.target for server in self.ready]

    @property
    def other_targets(self) -> list[ChatTarget]:
        """One target for each further model of mixed servers."""
        found = {server.client.target.digest: server.client.target for server in self.ready}
        return [target for digest, target in found.items() if digest != self.target.digest]

    @property
    def is_loaded(self) -> bool:
        """True once a server has loaded the model."""
        return self._window is not None

    def states(self) -> list[dict[str, Any]]:
        """Return the state of each server; see ``Server.state``."""
        return [server.state() for server in self.servers]

    async def prepare(self, _settings: Settings | None = None) -> ChatTarget:
        """Check the servers that take calls, leave out those that differ, and return the target.

        Raises:
            LLMUnavailableError: No server answers.
            ConfigurationError: No server has the model, or at the start of a run no other is like the first.
        """
        asked = self.ready
        checks = await asyncio.gather(*(server.check() for server in asked), return_exceptions=True)
        found: dict[Server, Traits] = {}
        for server, traits in zip(asked, checks, strict=True):
            if isinstance(traits, Traits):
                found[server] = traits
            elif isinstance(traits, LLMError | ConfigurationError):
                self._leave_out(server, traits)
            else:
                raise traits
        if not found:
            raise self._first_error()
        is_start = self._traits is None
        if self._traits not in found.values():
            self._first, self._traits = next(iter(found.items()))
        for server, traits in found.items():
            if problem := self._difference(traits):
                self._leave_out(server, problem)
        is_alone = len(self.ready) == 1 and sum(server.is_reachable for server in asked) > 1
        if is_start and is_alone and not self._fails_fast:  # a service answers with what there is
            raise _none_alike(self.servers)
        return self.target

    async def warm_up(self, choice: WindowChoice, say: Say) -> ChatTarget:
        """Load the model on all servers, with the window that the first one gives, and return the target.

        Raises:
            LLMError: It does not load on any.
            ConfigurationError: All others give a smaller window than the first.
        """
        self._choice = choice
        for server in self.ready:
            try:
                self._window = self._wanted = (await server.load(choice, say)).num_ctx
            except LLMError as exc:
                self._leave_out(server, exc)
            else:
                self._first = server
                break
        if self._window is None:
            raise self._first_error()
        others = [server for server in self.ready if server is not self._first]
        problems = await asyncio.gather(*(self._load(server, say) for server in others))
        for server, found in zip(others, problems, strict=True):
            if found is not None:
                self._leave_out(server, found)
        if not self._fails_fast and others and all(isinstance(found, ConfigurationError) for found in problems):
            raise _none_alike(self.servers)
        return self.target

    def with_window(self, choice: WindowChoice | None) -> Self:
        """Use *choice* when the model is loaded; None: the documents are not known. Return the pool."""
        self._choice = choice
        return self

    async def load(self, say: Say = logger.info) -> None:
        """Load the model on the servers that take calls. Raises as ``warm_up``."""
        asked = self._settings.ollama_num_ctx
        await self.warm_up(self._choice or choose_window(None, self.target.context_limit, asked), say)

    def adopt(self, num_ctx: int) -> None:
        """Use the larger window *num_ctx* from the next call on; see ``SharedWindow.adopt``."""
        if self._wanted is not None and num_ctx > self._wanted and self._settings.ollama_num_ctx is None:
            self._wanted = num_ctx
            for server in self.ready:
                server.window.adopt(num_ctx)

    async def renew(self) -> None:
        """Do nothing: ``classify`` renews the window of the server that it chooses."""

    async def classify(self, classifier: Classifier, conversation: Conversation, attempt: int) -> Outcome:
        """Return the labels of *conversation* from the server with the shortest expected wait.

        If that server goes away meanwhile, another one is asked, and the document keeps its attempts.

        Raises:
            LLMOutageError: No server took calls for longer than the limit or, with *fails_fast*, none does now.
            LLMError, SkippedDocumentError: As ``ollama_classify_async``.
        """
        lost: LLMError | None = None
        for _ in range(MOVES):
            server = await self._choose()
            try:
                return await server.classify(self._classifier_for(server, classifier), conversation, attempt)
            except LLMElsewhereError as exc:
                lost = exc
            except LLMModelError as exc:
                if self.ready == [server]:
                    raise
                lost = exc
                self._leave_out(server, exc)
            except LLMUnavailableError as exc:
                if server.failures >= FAILURES and server.is_ready:
                    self._leave_out(
                        server, LLMError(f"{server.failures} conversations in a row failed, the last one: {exc}")
                    )
                raise
        raise LLMUnavailableError(f"{MOVES} model servers in a row went away during the call: {lost}") from lost

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the ``current`` slots; wait until one is free."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._held < self.current)
            self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            async with self._freed:  # limits change with answers, and each answer frees a slot
                self._freed.notify(max(0, self.current - self._held))

    async def close(self) -> None:
        """Stop probes and loads. Cancel calls before."""
        for server in self.servers:
            await server.close()

    async def _choose(self) -> Server:
        while not (ready := self.ready):
            sentence = (
                f"no model server takes calls ({'; '.join(f'{one.name}: {one.problem}' for one in self.servers)})"
            )
            if self._fails_fast:
                raise LLMOutageError(f"{sentence}; the service continues when one is back")
            if not await self._one_is_back():
                raise LLMOutageError(
                    f"for more than {self._settings.outage_limit_s:.0f} s {sentence}; run the same command again when one is back"
                )
        now_s = time.monotonic()
        return min(ready, key=lambda server: server.wait(now_s))

    async def _one_is_back(self) -> bool:
        """Return True as soon as a server takes calls, False if that takes longer than the limit."""
        waits = [asyncio.ensure_future(server.client.breaker.until_closed()) for server in self.servers]
        limit_s = self._settings.outage_limit_s
        try:
            done, _ = await asyncio.wait(
                waits, timeout=None if math.isinf(limit_s) else limit_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for wait in waits:
                wait.cancel()
        return bool(done)

    def _classifier_for(self, server: Server, classifier: Classifier) -> Classifier:
        """Return *classifier*, or its like for another model: it learns the token counts of one."""
        digest = server.client.target.digest
        if digest == self.target.digest:
            return classifier
        if (classifier, digest) not in self._classifiers:
            self._classifiers[classifier, digest] = classifier.restyled(classifier.reply_style)
        return self._classifiers[classifier, digest]

    async def _takes_calls(self, server: Server) -> bool:
        """Return whether *server* answers and is like the first; one that comes back loads the model. The breaker's probe."""
        is_back = not server.is_ready
        try:
            problem: LLMError | ConfigurationError | None
            problem = self._difference(await server.check())
            if problem is None and is_back and self._window is not None:
                problem = await self._load(server, logger.info)
        except (LLMError, ConfigurationError) as exc:
            problem = exc
        if problem is None and is_back:
            logger.info("model server %s takes calls", server.name)
        elif problem is not None and str(problem) != str(server.error):
            logger.warning(TAKEN_OUT, server.name, problem)
        server.error = problem
        return problem is None

    async def _load(self, server: Server, say: Say) -> LLMError | ConfigurationError | None:
        """Load the model with the window of all servers, and return why *server* takes no calls, None if it does."""
        try:
            target = await server.load(self._choice_like_others(server), say)
        except LLMError as exc:
            return exc
        # A larger one that another program has loaded is no problem, and a server may give less than a worker has asked for.
        if self._window is None or target.num_ctx >= self._window or self._settings.allow_mixed_models:
            return None
        return ConfigurationError(f"it gives a window of {target.num_ctx} tokens instead of {self._window}")

    def _choice_like_others(self, server: Server) -> WindowChoice:
        """Return the choice that gives *server* the window of the others."""
        window = choose_window(None, server.client.target.context_limit, self._wanted)
        return replace(self._choice or window, num_ctx=window.num_ctx, least=window.least)

    def _difference(self, traits: Traits) -> ConfigurationError | None:
        """Return how a server with *traits* differs from the first, None if that is accepted."""
        differences = [] if self._traits is None else traits.differences(self._traits)
        if not differences:
            return None
        return None if self._settings.allow_mixed_models else ConfigurationError(f"it has {' and '.join(differences)}")

    def _first_error(self) -> LLMError | ConfigurationError:
        """Return why the first server that takes no calls does not; without the traceback, which would grow each time."""
        error = next((server.error for server in self.servers if server.error is not None), None)
        return LLMUnavailableError("no model server takes calls") if error is None else error.with_traceback(None)

    def _leave_out(self, server: Server, problem: LLMError | ConfigurationError) -> None:
        """Send *server* no calls until its probe succeeds."""
        server.error = problem
        if server.is_ready:  # each call in flight may find the same problem
            logger.warning(TAKEN_OUT, server.name, problem)
        server.client.breaker.open(str(problem))


def _none_alike(servers: Sequence[Server]) -> ConfigurationError:
    told = "; ".join(f"{server.name}: {server.problem}" for server in servers if server.problem)
    return ConfigurationError(
        f"No two model servers are alike ({told}). Install the same model and version on all of them, remove the wrong "
        "address from OLLAMA_ENDPOINT, or use --allow-mixed-models."
    )


@asynccontextmanager
async def open_pool(
    settings: Settings,
    most: int,
    *,
    logprobs: bool = False,
    on_answer: Callable[[ChatReply], None] | None = None,
    fails_fast: bool = False,
) -> AsyncIterator[ServerPool]:
    """Open a pool of the servers in *settings*, each with at most *most* calls, or as many as MAX_CONCURRENT=auto finds.

    *logprobs* and *on_answer* are those of ChatTarget and AsyncLLMClient. Nothing is sent before ``prepare``.
    """
    each = settings.for_each_server()
    async with open_session((most + FREE) * len(each)) as session:
        servers = []
        for one in each:
            limit = ConcurrencyLimit(most) if settings.max_concurrent == "auto" and not fails_fast else None
            target = replace(chat_target(one, one.model or ""), logprobs=logprobs)
            client = AsyncLLMClient(one, target, session, limit=limit, on_answer=on_answer)
            servers.append(Server(one, client, most, limit))
        pool = ServerPool(settings, servers, fails_fast=fails_fast)
        try:
            yield pool
        finally:
            await pool.close()
