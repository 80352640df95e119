"""Checks the context window of a run against the one that the server gives, for ``cli.py doctor``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from async_llm_wrapper import AsyncLLMClient
from commands.diagnosis.findings import Finding
from config import Settings
from error_handler import TriadError
from model_server.models import LoadedModel, find_loaded
from model_server.window import SHARE, WindowChoice, choose_window
from worker.plan import Sample, run_window


async def settle_window(client: AsyncLLMClient, settings: Settings, sample: Sample) -> AsyncGenerator[Finding]:
    """Give the target of the prepared *client* the window of a run, and yield findings about it.

    As in a run, a loaded model keeps its window if it is large enough and the operator set none.
    """
    limit = client.target.context_limit
    try:
        choice = await run_window(client, settings.ollama_num_ctx, sample)
    except TriadError as exc:
        choice = choose_window([], limit)
        sentence = f"Could not measure the documents to choose a window: {str(exc).rstrip('.')}."
        yield Finding("warning", sentence, f"Fix that; these checks use {choice.num_ctx} tokens until then.")
    else:
        yield _chosen(choice)
    loaded = find_loaded(client.target.model, await client.loaded())
    num_ctx = choice.beside(loaded)
    if num_ctx != choice.num_ctx:
        yield Finding("ok", f"The model is loaded with a window of {num_ctx} tokens; a run uses that.")
    client.target = replace(client.target, num_ctx=num_ctx)
    if limit is None:
        yield Finding("ok", "The server does not report the model's own context limit.")
    else:
        yield Finding("ok", f"The model's own limit is {limit} tokens; a run uses {num_ctx}.")


def given_window(asked: int, limit: int | None, entry: LoadedModel, *, by_us: bool) -> Iterator[Finding]:
    """Compare the window of *entry* with *asked*; *by_us* means that we loaded it with that window."""
    given = entry.context_length
    numbers = {"asked": asked, "given": given, "limit": limit}
    if given is None:
        yield Finding("ok", "The server does not report the window that it gives.", numbers=numbers)
    elif given == asked:
        yield Finding("ok", f"The server gives the whole window of {asked} tokens.", numbers=numbers)
    elif given < asked and by_us:
        sentence = f"The server gives a window of {given} tokens instead of {asked}."
        remedy = f"Set OLLAMA_NUM_CTX={given} or use fewer parallel slots; longer conversations are truncated."
        yield Finding("warning", sentence, remedy, numbers)
    else:
        sentence = f"The model is loaded with {given} tokens; a window of {asked} loads it again."
        yield Finding("warning", sentence, "Set the same window in all clients of this model.", numbers)


def _chosen(choice: WindowChoice) -> Finding:
    num_ctx = choice.num_ctx
    numbers = {"num_ctx": num_ctx, "asked": choice.asked, "sample": choice.sample, "held": round(choice.held, 4)}
    if choice.asked is not None and choice.asked > num_ctx:
        sentence = f"OLLAMA_NUM_CTX is {choice.asked}, but the model's limit is {num_ctx} tokens."
        return Finding("warning", sentence, f"Set OLLAMA_NUM_CTX={num_ctx}, or use another model.", numbers)
    if choice.asked is not None:
        return Finding("ok", f"OLLAMA_NUM_CTX sets a window of {num_ctx} tokens.", numbers=numbers)
    if not choice.sample:
        sentence = f"A run uses a window of {num_ctx} tokens (default; no conversations to sample)."
        return Finding("ok", sentence, numbers=numbers)
    sentence = (
        f"A run uses a window of {num_ctx} tokens, which holds {choice.held:.1%} of a sample of "
        f"{choice.sample} conversations."
    )
    if choice.held >= SHARE:
        return Finding("ok", sentence, numbers=numbers)
    return Finding("warning", sentence, "The rest is truncated; a model with a larger window holds more.", numbers)
