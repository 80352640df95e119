"""The window of a run, by a random sample of the source documents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from async_llm_wrapper import AsyncLLMClient
from model_server.tokens import TokenEstimator
from model_server.window import WindowChoice, choose_window, tokens_needed
from mongo_client import DocumentStore, translated

SAMPLE_SIZE, PAGE_SIZE = 200, 100  # documents; a page is in memory as a whole, at most 16 MB

Sample = Callable[[AsyncLLMClient], Awaitable[list[int]]]


async def run_window(client: AsyncLLMClient, asked: int | None, sample: Sample) -> WindowChoice:
    """Return the window that a run takes with the model of *client*, which is prepared.

    *asked* is what the operator set; without it, *sample* tells what documents need, as ``sample_needs`` does.

    Raises:
        TriadError: Whatever *sample* raises.
    """
    limit = client.target.context_limit
    if asked is not None or client.target.protocol == "openai_chat":
        return choose_window([], limit, asked)
    return choose_window(await sample(client), limit)


async def sample_needs(store: DocumentStore, collection: str, estimator: TokenEstimator) -> list[int]:
    """Return the window that each of SAMPLE_SIZE random documents of *collection* needs, in tokens.

    Documents of any status count: those that are done tell of those to come. Ones without text are left out.

    Raises:
        StoreError: MongoDB cannot say.
    """
    needs = []
    with translated("read a sample"):
        # Without a filter before it, $sample picks by a random cursor and reads no more than it returns.
        cursor = await store.database[collection].aggregate([{"$sample": {"size": SAMPLE_SIZE}}], batchSize=PAGE_SIZE)
        async for document in cursor:
            if transcript := rough_transcript(document):
                needs.append(tokens_needed(estimator.prompt_tokens(transcript)))
    return needs


def rough_transcript(document: Mapping[str, Any]) -> str:
    """Return the texts of *document* as long as their transcript will be.

    Not by the aggregator: a document that kills the worker there must do so in a run, which keeps a journal of it.
    """
    entries = document.get("tweets") or document.get("messages") or [document]
    texts = [entry.get("text") for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    return "\n".join(f"Customer: {text}" for text in texts if isinstance(text, str) and text.strip())
