"""Which context window does a run take, and is it what the server gives? Findings for ``cli.py doctor``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from async_llm_wrapper import AsyncLLMClient
from commands.diagnosis.findings import Finding
from config import Settings
from error_handler import TriadError
from model_server.models import LoadedModel
from model_server.warm_up import adopt_larger
from model_server.window import SHARE, WindowChoice, choose_window
from worker.plan import Sample, run_window


async def settle_window(client: AsyncLLMClient, settings: Settings, sample: Sample) -> AsyncGenerator[Finding]:
    """Give the target of *client*, which is prepared, the window that a run would take, and yield what that is.

    As in a run, a loaded model keeps its window where that is large enough, unless the operator set one.
    """
    limit = client.target.context_limit
    try:
        choice = await run_window(client, settings.ollama_num_ctx, sample)
    except TriadError as exc:
        choice = choose_window([], limit)
        sentence = f"The documents could not be asked which window they need: {str(exc).rstrip('.')}."
        yield Finding("warning", sentence, f"Correct that; until then {choice.num_ctx} tokens are looked at here.")
    else:
        yield _chosen(choice)
    loaded = loaded_entry(client, await client.loaded())
    num_ctx = adopt_larger(choice, loaded)
    if num_ctx != choice.num_ctx:
        yield Finding("ok", f"The model is loaded with a window of {num_ctx} tokens, which a run uses as it is.")
    client.target = replace(client.target, num_ctx=num_ctx)
    if limit is None:
        yield Finding("ok", "The server does not tell the model's own context limit.")
    else:
        yield Finding("ok", f"The model's own limit is {limit} tokens; {num_ctx} are asked for.")


def loaded_entry(client: AsyncLLMClient, loaded: list[LoadedModel]) -> LoadedModel | None:
    """Return what *loaded* says about the model of *client*; None where it is not loaded."""
    names = (client.target.model, f"{client.target.model}:latest")
    return next((one for one in loaded if one.name in names), None)


def given_window(asked: int, limit: int | None, entry: LoadedModel, *, by_us: bool) -> Iterator[Finding]:
    """Yield how the window of *entry* compares with *asked*; *by_us*: it was loaded for a request with that window."""
    given = entry.context_length
    numbers = {"asked": asked, "given": given, "limit": limit}
    if given is None:
        yield Finding("ok", "The server does not tell the window that it gives.", numbers=numbers)
    elif given == asked:
        yield Finding("ok", f"The server gives the whole window of {asked} tokens.", numbers=numbers)
    elif given < asked and by_us:
        sentence = f"The server gives a window of {given} tokens where {asked} are asked for."
        remedy = f"OLLAMA_NUM_CTX={given}, or less parallel slots: longer conversations are cut to fit."
        yield Finding("warning", sentence, remedy, numbers)
    else:
        sentence = f"The model is loaded with {given} tokens; with {asked} it is loaded again."
        yield Finding("warning", sentence, "Let all clients of this model ask for the same window.", numbers)


def _chosen(choice: WindowChoice) -> Finding:
    num_ctx = choice.num_ctx
    numbers = {"num_ctx": num_ctx, "asked": choice.asked, "sample": choice.sample, "held": round(choice.held, 4)}
    if choice.asked is not None and choice.asked > num_ctx:
        sentence = f"A window of {choice.asked} tokens is asked for, and the model was made for {num_ctx}."
        return Finding("warning", sentence, f"OLLAMA_NUM_CTX={num_ctx}, or another model.", numbers)
    if choice.asked is not None:
        return Finding("ok", f"OLLAMA_NUM_CTX sets a window of {num_ctx} tokens.", numbers=numbers)
    if not choice.sample:
        sentence = f"A run takes a window of {num_ctx} tokens: there are no conversations to choose it by."
        return Finding("ok", sentence, numbers=numbers)
    sentence = (
        f"A run takes a window of {num_ctx} tokens, which holds {choice.held:.1%} of a sample of "
        f"{choice.sample} conversations."
    )
    if choice.held >= SHARE:
        return Finding("ok", sentence, numbers=numbers)
    return Finding("warning", sentence, "The rest is cut to fit; a model with a larger window holds more.", numbers)
