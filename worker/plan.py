"""The plan of a run: plan fingerprint, context window, and documents that need work."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import async_llm_wrapper as llm
from aggregator import TEXT_FIELDS, entry_text
from classifier import Classifier, ModelClient
from config import Settings, load_prompt_taxonomy
from domain.reply_style import STYLES
from error_handler import StoreError
from model_server.models import chat_target
from model_server.protocol import ChatTarget
from model_server.tokens import TokenEstimator
from model_server.window import WindowChoice, choose_window, tokens_needed
from mongo_client import DocumentStore
from worker.reply_choice import classifier_for
from worker.staleness import Plan

if TYPE_CHECKING:  # few runs have several servers
    from worker.server_pool import ServerPool

logger = logging.getLogger(__name__)

SAMPLE_SIZE = 200  # documents
# Of the turns only what rough_transcript reads, so that the server sends, and sorts, no attachments.
SAMPLE_FIELDS = ("text", *(f"{turns}.{name}" for turns in ("tweets", "messages") for name in TEXT_FIELDS))

Sample = Callable[[], Awaitable[list[int]]]


def plan_of(classifier: Classifier, target: ChatTarget, mixed: Sequence[ChatTarget] = ()) -> Plan:
    """Return the plan of a run with *target*; *mixed* are those of servers with another model, if that is allowed."""
    others = (classifier.restyled(style) for style in STYLES if style != classifier.reply_style)
    return replace(_plan(classifier, target, mixed), others=tuple(_plan(other, target, mixed) for other in others))


def _plan(classifier: Classifier, target: ChatTarget, mixed: Sequence[ChatTarget] = ()) -> Plan:
    def named(name: str) -> str:
        return classifier.plan(replace(target, model=name))

    return Plan(classifier.plan(target), target.digest, named, mixed=tuple(_plan(classifier, other) for other in mixed))


async def ask_plan(settings: Settings) -> Plan:
    """Return the plan of a run with *settings* now; the server is only asked for its models."""
    taxonomy = load_prompt_taxonomy(settings)
    mixed: list[ChatTarget] = []
    async with AsyncExitStack() as stack:
        client = await open_client(stack, settings, 1)
        target = await client.prepare(settings)
        if not isinstance(client, llm.AsyncLLMClient):
            mixed = client.other_targets
    return plan_of(classifier_for(settings, target, taxonomy), target, mixed)


async def open_client(stack: AsyncExitStack, settings: Settings, most: int) -> llm.AsyncLLMClient | ServerPool:
    """Return the client of the model server, or the pool of several, for at most *most* calls on each; *stack* closes it."""
    if len(settings.ollama_endpoints) > 1:
        from worker.server_pool import open_pool  # noqa: PLC0415 - few runs have several servers

        return await stack.enter_async_context(open_pool(settings, most))
    session = await stack.enter_async_context(llm.open_session(most))
    client = llm.AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
    stack.push_async_callback(client.breaker.close)
    return client


async def run_window(client: ModelClient, asked: int | None, sample: Sample) -> WindowChoice:
    """Return the context window for a run with the model of *client*, which is prepared.

    It is *asked* if the operator set that, else the choice for the tokens that *sample* returns, as ``sample_needs`` does.
    """
    is_known = asked is not None or client.target.protocol == "openai_chat"
    needs = [] if is_known else [need + client.target.thinking_tokens for need in await sample()]
    return choose_window(needs, client.target.context_limit, asked)


async def sample_needs(store: DocumentStore, estimator: TokenEstimator) -> list[int]:
    """Return the window that each of SAMPLE_SIZE random documents needs, in tokens.

    Documents of any status count, because those that are done predict those to come. Documents without text do not.
    """
    needs = []
    async for document in store.sample(SAMPLE_SIZE, SAMPLE_FIELDS):
        if transcript := rough_transcript(document):
            needs.append(tokens_needed(estimator.prompt_tokens(transcript)))
    return needs


async def sample_if_in_time(store: DocumentStore, estimator: TokenEstimator) -> list[int]:
    """Return what ``sample_needs`` does, or nothing if MongoDB does not give it (in time): the window is then the default."""
    try:
        return await sample_needs(store, estimator)
    except StoreError as exc:
        logger.warning("the window is chosen without a sample of the documents: %s", exc)
        return []


def rough_transcript(document: Mapping[str, Any]) -> str:
    """Return the texts of *document*, about as long as its transcript.

    The conversation is not aggregated: a document that crashes that must do so in a run, which has a journal to notice it.
    """
    entries = document.get("tweets") or document.get("messages") or [document]
    texts = map(entry_text, entries) if isinstance(entries, list) else ()
    return "\n".join(f"Customer: {text}" for text in texts if text)
