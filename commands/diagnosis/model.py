"""Checks of the model server for ``cli.py doctor``: model, window, memory, a test conversation, prefix cache, slots."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from aggregator import aggregate_conversation
from async_llm_wrapper import AsyncLLMClient, ollama_classify_async, open_session
from commands.diagnosis.findings import Finding, error, ok, warning
from commands.diagnosis.prefix import check_prefix
from commands.diagnosis.slots import MESSAGES, SCHEMA_JSON, Measurement, measure, without_second_attempts
from config import Settings
from domain.conversation import stored_labels
from domain.text import counted
from error_handler import (
    ConfigurationError,
    LLMAbsentError,
    LLMBusyError,
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMOutdatedError,
    LLMReplyError,
    LLMTimeoutError,
    Reason,
    TriadError,
)
from model_server.chat import is_outdated
from model_server.models import (
    BEHIND_V1,
    LoadedModel,
    ModelFacts,
    ServedModel,
    chat_target,
    choose_model,
    is_cloud_name,
    with_model,
)
from model_server.protocol import ChatTarget
from model_server.window import SHARE, WindowChoice, choose_window
from network.addresses import is_loopback
from network.outgoing import origin
from worker.plan import Sample, run_window
from worker.reply_choice import classifier_for

LOAD_TIMEOUT_S = 600.0  # Ollama gives up after 5 minutes without progress; an earlier timeout here would abort the load
ROUNDS = 2

REMEDIES: dict[type[LLMError], str] = {
    LLMOutdatedError: "Update Ollama (https://ollama.com/download), or use a newer server.",
    LLMBusyError: "Wait until it is idle; if memory is short, use a smaller model or a smaller OLLAMA_NUM_CTX.",
    LLMTimeoutError: "It accepts connections but does not respond: restart it (systemctl restart ollama).",
    LLMContextError: "Raise OLLAMA_NUM_CTX: the window must hold the instructions, the labels and an answer.",
    LLMModelError: "Choose another model with --model; if the server requires a key, check LLM_API_KEY.",
}

TEST_DOCUMENT = {
    "messages": [
        {"sender": "customer", "text": "Where is my parcel? It should have been here on Monday."},
        {"sender": "agent", "text": "Sorry about that! Could you send us the order number?"},
        {"sender": "customer", "text": "I did that twice already. This is really annoying."},
    ]
}


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """The target of *client*; *settings* are those of a run. Only Ollama reports versions, windows and memory.

    The probe sends up to *at_most* concurrent requests, none if it is 0. *tell* gets the progress.
    """

    client: AsyncLLMClient
    settings: Settings
    at_most: int
    tell: Callable[[str], None]


async def diagnose_model(
    settings: Settings, sample: Sample, at_most: int, tell: Callable[[str], None]
) -> AsyncGenerator[Finding]:
    """Yield the findings about the model server of *settings*. Every request is sent once, without retries.

    *sample* returns the token counts of documents, from which a run chooses its window. ModelUnderTest explains *at_most*
    and *tell*. A failed check ends the diagnosis if the rest depends on it.
    """
    if exposed := unencrypted(settings):
        yield exposed
    is_ollama = settings.protocol != "openai_chat"
    patient = without_second_attempts(settings).model_copy(update={"llm_timeout_s": LOAD_TIMEOUT_S})
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session(1))
        # Without a list of models, the named one is tried, which takes a request.
        named = settings.model if settings.model and at_most and not is_cloud_name(settings.model) else ""
        client = AsyncLLMClient(patient, chat_target(settings, named), session)
        stack.push_async_callback(client.breaker.close)
        try:
            version = await client.version() if is_ollama else None
            models = await client.list_models()
        except LLMError as exc:
            yield error(_sentence(exc), _remedy(exc, settings))
            return
        yield _server(settings, version, [] if models == [ServedModel(named)] else models)
        if not is_ollama and await client.finds_ollama():
            yield warning(
                f"{BEHIND_V1[0].upper()}{BEHIND_V1[1:].partition(';')[0]}.",
                "Set OLLAMA_ENDPOINT instead of LLM_API_URL.",
            )
        try:
            model = choose_model(settings, models)
        except ConfigurationError as exc:
            yield error(str(exc), "Install one with ollama pull MODEL, or choose one with --model or OLLAMA_MODEL.")
            return
        facts = await client.show(model.name) if is_ollama else ModelFacts()
        client.target = with_model(chat_target(settings, settings.model or ""), model, facts)
        tested = ModelUnderTest(client, settings, at_most, tell)
        for finding in _describe(model, facts, client.target) if models else ():
            yield finding
        if is_ollama:
            async for finding in _settle_window(tested, sample):
                yield finding
        async for finding in _probe(tested):
            yield finding


def unencrypted(settings: Settings) -> Finding | None:
    """Return a warning if customer text would cross a network unencrypted."""
    parts = urlsplit(settings.server_url)
    if parts.scheme == "https" or is_loopback(parts.hostname):
        return None
    sentence = (
        f"{origin(settings.server_url)} is another machine without encryption: customer text crosses the network."
    )
    return warning(sentence, "Use TLS (https://) or a tunnel (ssh -L); ignore this in a private container network.")


def _server(settings: Settings, version: str | None, models: list[ServedModel]) -> Finding:
    remote = sum(model.remote for model in models)
    local = len(models) - remote
    name = f"Ollama {version}" if version else "The model server"
    refused = f", and {remote} in a cloud, which are refused" if remote else ""
    holds = f"with {counted(local, 'local model')}{refused}" if models or version else "and lists no models"
    sentence = f"{name} answers at {origin(settings.server_url)} {holds}"
    numbers = {"version": version, "local_models": local, "remote_models": remote}
    if is_outdated(version):
        remedy = "Update it to 0.5.0 or later; 0.12.11 or later has everything that a run uses."
        return warning(f"{sentence}. This version takes no JSON schema, which every request holds.", remedy, **numbers)
    return ok(f"{sentence}.", **numbers)


def _describe(model: ServedModel, facts: ModelFacts, target: ChatTarget) -> Iterator[Finding]:
    """Yield what the server knows about the model without loading it."""
    details = [
        facts.parameter_size and f"{facts.parameter_size} parameters",
        facts.quantization and f"quantisation {facts.quantization}",
        model.digest and f"digest {model.digest.removeprefix('sha256:')[:12]}",
        facts.context_length and f"context limit {facts.context_length} tokens",
    ]
    known = ", ".join(detail for detail in details if detail) or "this protocol reports no details"
    yield ok(
        f"The server has {model.name}: {known}.",
        model=model.name,
        digest=model.digest,
        quantization=facts.quantization,
        parameter_size=facts.parameter_size,
        can_think=facts.can_think,
        context_length=facts.context_length,
    )
    if not facts.can_chat:
        yield error(f"{model.name} cannot chat: it is an embedding model.", "Choose another with --model.")
    if target.think_level:
        sentence = (
            f"The model cannot be kept from reasoning: every request asks for the least (think: {target.think_level})"
        )
        remedy = "Another model answers several times as fast."
        yield warning(f"{sentence} and leaves room for {target.thinking_tokens} more tokens.", remedy)
    elif target.disable_thinking:
        yield ok("The model can reason; every request disables that (think: false).")


async def _settle_window(tested: ModelUnderTest, sample: Sample) -> AsyncGenerator[Finding]:
    """Give the target of the client the window of a run, and yield findings about it.

    As in a run, a loaded model keeps its window if it is large enough and the operator set none.
    """
    client = tested.client
    try:
        choice = await run_window(client, tested.settings.ollama_num_ctx, sample)
    except TriadError as exc:
        choice = choose_window([], client.target.context_limit)
        sentence = f"Could not measure the documents to choose a window: {str(exc).rstrip('.')}."
        yield warning(sentence, f"Fix that; these checks use {choice.num_ctx} tokens until then.")
    else:
        yield _chosen(choice)
    num_ctx = choice.beside(await client.loaded())
    if num_ctx != choice.num_ctx:
        yield ok(f"The model is loaded with a window of {num_ctx} tokens; a run uses that.")
    client.target = replace(client.target, num_ctx=num_ctx)


def _chosen(choice: WindowChoice) -> Finding:
    numbers = {"num_ctx": choice.num_ctx, "asked": choice.asked, "sample": choice.sample, "held": round(choice.held, 4)}
    sentence = f"A run's {choice}."
    if choice.asked is not None and choice.asked > choice.num_ctx:
        return warning(sentence, f"Set OLLAMA_NUM_CTX={choice.num_ctx}, or use another model.", **numbers)
    if choice.held < SHARE:
        return warning(sentence, "The rest is truncated; a model with a larger window holds more.", **numbers)
    return ok(sentence, **numbers)


async def _probe(tested: ModelUnderTest) -> AsyncGenerator[Finding]:
    """Yield the findings about load, memory, a classification, prefix and slots; memory only if at_most is 0."""
    settings = tested.settings
    if tested.at_most:
        tested.tell(f"Loading {tested.client.target.model} ...")
        try:
            yield await _load(tested)
        except LLMError as exc:
            yield error(f"The model does not answer: {exc}.", _remedy(exc, settings))
            return
    if tested.client.target.protocol != "openai_chat":
        async for finding in _memory(tested):
            yield finding
    if not tested.at_most:
        return
    async for finding in _answers(tested):
        yield finding
    tested.tell("Probing for slots ...")
    # Another window would make the server reload the model.
    once = without_second_attempts(settings).model_copy(update={"ollama_num_ctx": tested.client.target.num_ctx})
    try:
        measured = await measure(once, tested.at_most, ROUNDS, tested.tell, until_one_waits=True)
    except LLMError as exc:
        yield error(f"The slots could not be measured: {exc}.", _remedy(exc, settings))
        return
    if measured.stopped:
        yield warning(f"The probe stopped {measured.stopped}.", "Check the log of the model server.")
    yield _slots(measured, settings.max_concurrent)


async def _answers(tested: ModelUnderTest) -> AsyncGenerator[Finding]:
    """Yield the findings about a classification, reasoning and the prefix cache."""
    tested.tell("Classifying a test conversation ...")
    yield await _classify(tested)
    if switches := tested.client.target.thinking_switches:
        yield ok(f"The model reasons; requests ask for none ({', '.join(switches)}).")
    tested.tell("Testing the prefix cache ...")
    try:
        if (reuse := await check_prefix(tested.client, tested.settings)) is not None:
            yield reuse
    except LLMError as exc:
        yield error(f"The prefix cache was not tested: {exc}.", _remedy(exc, tested.settings))


async def _load(tested: ModelUnderTest) -> Finding:
    """Send one small request with the options of a run, which loads the model if necessary."""
    start = time.monotonic()
    load_s = None
    with suppress(LLMReplyError):  # the test conversation checks the answers
        load_s = (await tested.client.chat(MESSAGES, SCHEMA_JSON)).load_s
    took_s, timeout_s = time.monotonic() - start, tested.settings.llm_timeout_s
    numbers = {"first_answer_s": round(took_s, 3), "load_s": None if load_s is None else round(load_s, 3)}
    loading = "" if load_s is None else f", including {load_s:.1f} s to load the model"
    sentence = f"The first answer took {took_s:.1f} s{loading}."
    if took_s <= timeout_s:
        return ok(sentence, **numbers)
    remedy = f"Raise LLM_TIMEOUT_S above {took_s:.0f}, or keep the model loaded (OLLAMA_KEEP_ALIVE=-1)."
    return warning(f"{sentence} A call times out after {timeout_s:g} s, which aborts the load.", remedy, **numbers)


async def _memory(tested: ModelUnderTest) -> AsyncGenerator[Finding]:
    """Yield the real window of the loaded model, and whether it fits into the GPU."""
    try:
        entry = await tested.client.loaded()
    except LLMError as exc:
        yield error(_sentence(exc), _remedy(exc, tested.settings))
        return
    if entry is None:
        yield ok(f"{tested.client.target.model} is not loaded; the first call of a run loads it.")
        return
    yield _given_window(tested, entry)
    if entry.size_bytes and entry.vram_bytes is not None:
        yield _gpu_share(entry.size_bytes, entry.vram_bytes)


def _given_window(tested: ModelUnderTest, entry: LoadedModel) -> Finding:
    """Compare the window of the loaded model with the requested one."""
    asked, given = tested.client.target.num_ctx, entry.context_length
    numbers = {"asked": asked, "given": given, "limit": tested.client.target.context_limit}
    if given is None:
        return ok("The server does not report the window that it gives.", **numbers)
    if given == asked:
        return ok(f"The server gives the whole window of {asked} tokens.", **numbers)
    if given < asked and tested.at_most:  # the probe loaded it
        remedy = f"Set OLLAMA_NUM_CTX={given} or use fewer parallel slots; longer conversations are truncated."
        return warning(f"The server gives a window of {given} tokens instead of {asked}.", remedy, **numbers)
    sentence = f"The model is loaded with {given} tokens; a window of {asked} loads it again."
    return warning(sentence, "Set the same window in all clients of this model.", **numbers)


def _gpu_share(size_bytes: int, vram_bytes: int) -> Finding:
    numbers, size = {"size_bytes": size_bytes, "vram_bytes": vram_bytes}, f"{size_bytes / 1e9:.1f} GB"
    if vram_bytes >= size_bytes:
        return ok(f"The model fits into GPU memory ({size}).", **numbers)
    if vram_bytes == 0:
        sentence = f"The model runs on the CPU only ({size}): an answer takes seconds or minutes."
        return warning(sentence, "Use a GPU, which is many times faster, or a small model.", **numbers)
    sentence = f"{1 - vram_bytes / size_bytes:.0%} of the model ({size}) is outside GPU memory, which slows every call."
    return warning(sentence, "Use a smaller model, a stronger quantisation or a smaller OLLAMA_NUM_CTX.", **numbers)


async def _classify(tested: ModelUnderTest) -> Finding:
    """Classify a test conversation exactly as a run does: taxonomy, prompt, schema, request, validation."""
    try:
        classifier = classifier_for(tested.settings, tested.client.target)
    except ConfigurationError:
        sentence = "The test conversation was not classified because the labels do not load."
        return warning(sentence, "See the section Labels below.")
    try:
        outcome = await ollama_classify_async(aggregate_conversation(TEST_DOCUMENT), tested.client, classifier)
    except LLMReplyError as exc:
        sentence = f"Both answers to the test conversation are invalid ({exc.reason}: {exc})."
        if tested.client.target.think_level and exc.reason in (Reason.CUT_OFF, Reason.EMPTY):
            return error(sentence, "It thinks until no room is left, and cannot be kept from it: use another model.")
        return error(sentence, "Use a larger model, or one that follows a JSON schema.")
    except LLMError as exc:
        return error(f"The test conversation got no answer: {exc}.", _remedy(exc, tested.settings))
    labels = outcome.classification.as_dict()
    labels.pop("categorization", None)
    numbers = {
        **labels,
        "attempts": outcome.attempts,
        "duration_s": outcome.duration_ms / 1000,
        "prompt_tokens": outcome.prompt_tokens,
        "reply_tokens": outcome.reply_tokens,
    }
    sentence = (
        f"The test conversation got valid labels in {outcome.duration_ms / 1000:.1f} s: "
        f"{', '.join(name for names in stored_labels(labels).values() for name in names)}"
    )
    if outcome.attempts > 1:
        return warning(f"{sentence}, but only on the second attempt.", "A larger model makes fewer errors.", **numbers)
    return ok(f"{sentence}.", **numbers)


def _slots(measured: Measurement, max_concurrent: object) -> Finding:
    slots, is_minimum = measured.slots, measured.is_minimum
    numbers = {
        "slots": slots,
        "slots_is_minimum": is_minimum,
        "enough_at_once": measured.enough,
        "max_concurrent": max_concurrent,
        "queue_wait_from": measured.queue_wait_from,
        "requests_per_s": {str(level.at_once): round(level.requests_per_s, 3) for level in measured.levels},
    }
    if not slots:
        sentence = "Even a single request waited for a slot: other clients are using the server."
        return warning(sentence, "Run the diagnosis again when the server is idle.", **numbers)
    sentence = f"The server runs {'at least ' if is_minimum else ''}{counted(slots, 'call')} at once"
    if not isinstance(max_concurrent, int):
        return ok(f"{sentence}.", **numbers)
    if max_concurrent > slots + 1 and not is_minimum:
        remedy = f"--max-concurrent {slots + 1}, or more slots: OLLAMA_NUM_PARALLEL={max_concurrent} for ollama serve."
        sentence += f", but MAX_CONCURRENT is {max_concurrent}: the other calls wait while their timeouts run."
        return warning(sentence, remedy, **numbers)
    if max_concurrent < slots:
        sentence += f", but MAX_CONCURRENT is {max_concurrent}: the other slots stay idle."
        return warning(sentence, f"--max-concurrent {slots if is_minimum else slots + 1}.", **numbers)
    return ok(f"{sentence}; MAX_CONCURRENT {max_concurrent} fits.", **numbers)


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _remedy(exc: LLMError, settings: Settings) -> str:
    for kind, remedy in REMEDIES.items():
        if isinstance(exc, kind):
            return remedy
    if not isinstance(exc, LLMAbsentError):
        log = " (journalctl -u ollama)" if settings.protocol != "openai_chat" else ""
        return f"Follow the sentence above; the log of the server{log} may say more."
    if settings.llm_api_url:
        return "Start the server, or check LLM_API_URL."
    if is_loopback(urlsplit(settings.server_url).hostname):
        return "Start it (ollama serve, or systemctl start ollama) and check its log (journalctl -u ollama)."
    return "Check the host and port, any firewall in between, and the log of the server."
