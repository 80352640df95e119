"""Is the model server ready for a run, and how much does it stand? Findings for ``cli.py doctor``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from aggregator import aggregate_conversation
from async_llm_wrapper import AsyncLLMClient, ollama_classify_async, open_session
from classifier import ReplyParser
from commands.diagnosis.findings import Finding, counted
from commands.diagnosis.slots import MESSAGES, SCHEMA_JSON, Measurement, measure, without_second_attempts
from commands.diagnosis.window import given_window, loaded_entry, settle_window
from config import Settings, load_taxonomy
from error_handler import (
    ConfigurationError,
    LLMBusyError,
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMReplyError,
    LLMTimeoutError,
)
from model_server.models import LoadedModel, ModelFacts, ServedModel, choose_model
from model_server.protocol import chat_target, with_model
from prompt_builder import PromptBuilder
from utils.network import is_loopback
from worker.plan import Sample

LOAD_TIMEOUT_S = 600.0  # Ollama gives up a load after 5 minutes without progress; leaving earlier would abort it
ROUNDS = 2

REMEDIES: dict[type[LLMError], str] = {
    LLMBusyError: "Wait until it is idle; where memory is short, take a smaller model or a smaller OLLAMA_NUM_CTX.",
    LLMTimeoutError: "It accepts connections and does not work: restart it (systemctl restart ollama).",
    LLMContextError: "Raise OLLAMA_NUM_CTX: the window must hold the instructions, the labels and an answer.",
    LLMModelError: "Name another model with --model, and look at LLM_API_KEY where the server wants a key.",
}

TEST_DOCUMENT = {
    "messages": [
        {"sender": "customer", "text": "Where is my parcel? It should have been here on Monday."},
        {"sender": "agent", "text": "Sorry about that! Could you send us the order number?"},
        {"sender": "customer", "text": "I did that twice already. This is really annoying."},
    ]
}


@dataclass(frozen=True, slots=True)
class Probing:
    """How far the model may be asked: not at all where *at_most* is 0, else with up to that many requests at once."""

    at_most: int
    tell: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """The model that is asked, and what the server says about it; *settings* are those of a run."""

    client: AsyncLLMClient
    settings: Settings
    model: ServedModel
    facts: ModelFacts

    @property
    def num_ctx(self) -> int:
        """The window that is asked for, tokens."""
        return self.client.target.num_ctx


async def _no_documents(_client: AsyncLLMClient) -> list[int]:
    return []


async def diagnose_model(
    settings: Settings, probing: Probing, sample: Sample = _no_documents
) -> AsyncGenerator[Finding]:
    """Yield what there is to say about the model server of *settings*.

    *sample* tells which windows the documents of a run need; the one of a run is asked for.
    What follows from a failed check is left out: nothing is asked of a server that is away, or of a model it lacks.
    Every request is sent once.
    """
    for finding in _endpoint(settings):
        yield finding
    patient = without_second_attempts(settings).model_copy(update={"llm_timeout_s": LOAD_TIMEOUT_S})
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session(1))
        client = AsyncLLMClient(patient, chat_target(settings, ""), session)
        stack.push_async_callback(client.breaker.close)
        try:
            version = await client.version() if settings.protocol != "openai_chat" else None
            models = await client.list_models()
        except LLMError as exc:
            yield Finding("error", _sentence(exc), _remedy(exc, settings))
            return
        yield _answers(settings, version, models)
        try:
            model = choose_model(settings, models)
        except ConfigurationError as exc:
            yield Finding("error", str(exc), "ollama pull MODEL brings a local one; --model or the variable names it.")
            return
        facts = ModelFacts()
        if settings.protocol != "openai_chat":
            facts = await client.show(model.name)
        client.target = with_model(chat_target(settings, settings.model or ""), model, facts)
        asked = Asked(client, settings, model, facts)
        async for finding in _look(asked, probing, sample):
            yield finding


async def _look(asked: Asked, probing: Probing, sample: Sample) -> AsyncGenerator[Finding]:
    """Yield what there is to say about a model that the server has."""
    for finding in _describe(asked):
        yield finding
    if asked.settings.protocol != "openai_chat":
        async for finding in settle_window(asked.client, asked.settings, sample):
            yield finding
    if probing.at_most:
        async for finding in _ask(asked, probing):
            yield finding
    elif asked.settings.protocol != "openai_chat":
        for finding in _memory(asked, await asked.client.loaded(), by_us=False):
            yield finding


def _endpoint(settings: Settings) -> Iterator[Finding]:
    parts = urlsplit(settings.server_url)
    if parts.scheme == "https" or is_loopback(parts.hostname):
        return
    sentence = (
        f"{settings.server_url} is another machine and not encrypted: customer text crosses the network as it is."
    )
    remedy = "Put TLS before it (https://), or a tunnel (ssh -L); in a private network of containers it may be meant."
    yield Finding("warning", sentence, remedy)


def _answers(settings: Settings, version: str | None, models: list[ServedModel]) -> Finding:
    remote = sum(model.remote for model in models)
    numbers = {"version": version, "local_models": len(models) - remote, "remote_models": remote}
    name = f"Ollama {version}" if version else "The model server"
    held = counted(len(models) - remote, "local model") + (
        f", {remote} in a cloud, which are refused" if remote else ""
    )
    return Finding("ok", f"{name} answers at {settings.server_url} with {held}.", numbers=numbers)


def _describe(asked: Asked) -> Iterator[Finding]:
    """Yield what the server says about the model without being asked to load it."""
    model, facts = asked.model, asked.facts
    numbers = {
        "model": model.name,
        "digest": model.digest,
        "quantization": facts.quantization,
        "parameter_size": facts.parameter_size,
        "can_think": facts.can_think,
        "context_length": facts.context_length,
    }
    details = [
        facts.parameter_size and f"{facts.parameter_size} parameters",
        facts.quantization and f"quantisation {facts.quantization}",
        model.digest and f"digest {model.digest.removeprefix('sha256:')[:12]}",
    ]
    told = ", ".join(detail for detail in details if detail) or "this protocol tells nothing more about it"
    yield Finding("ok", f"It has {model.name}: {told}.", numbers=numbers)
    if asked.settings.protocol == "openai_chat":
        return
    if facts.capabilities and "completion" not in facts.capabilities:
        yield Finding("error", f"{model.name} cannot chat: it is for embeddings.", "Name another with --model.")
    if facts.can_think:
        yield Finding("ok", "It can think aloud; every request switches that off (think: false).")


async def _ask(asked: Asked, probing: Probing) -> AsyncGenerator[Finding]:
    """Yield what only a model in work tells: the load, the memory, a classification, the slots."""
    settings = asked.settings
    probing.tell(f"Loading {asked.model.name} ...")
    try:
        yield await _load(asked)
    except LLMError as exc:
        yield Finding("error", f"The model does not answer: {exc}.", _remedy(exc, settings))
        return
    if settings.protocol != "openai_chat":
        try:
            loaded = await asked.client.loaded()
        except LLMError as exc:
            yield Finding("error", _sentence(exc), _remedy(exc, settings))
        else:
            for finding in _memory(asked, loaded, by_us=True):
                yield finding
    probing.tell("Classifying a test conversation ...")
    yield await _classify(asked)
    probing.tell("Asking with more and more requests at once ...")
    # With another window, the server would load the model again for the probe.
    once = without_second_attempts(settings).model_copy(update={"ollama_num_ctx": asked.num_ctx})
    try:
        measured = await measure(once, probing.at_most, ROUNDS, probing.tell, until_one_waits=True)
    except LLMError as exc:
        yield Finding("error", f"The slots were not measured: {exc}.", _remedy(exc, settings))
        return
    for finding in _slots(measured, settings.max_concurrent):
        yield finding


async def _load(asked: Asked) -> Finding:
    """Send one small request with the options of a run, which loads the model where it is not loaded so."""
    start = time.monotonic()
    load_s = None
    with suppress(LLMReplyError):  # the classification tells whether answers are usable
        load_s = (await asked.client.chat(MESSAGES, SCHEMA_JSON)).load_s
    took_s = time.monotonic() - start
    numbers = {"first_answer_s": round(took_s, 3), "load_s": None if load_s is None else round(load_s, 3)}
    told = "" if load_s is None else f", {load_s:.1f} s of it to load the model"
    sentence = f"The first answer took {took_s:.1f} s{told}."
    if took_s <= asked.settings.llm_timeout_s:
        return Finding("ok", sentence, numbers=numbers)
    remedy = f"Raise LLM_TIMEOUT_S above {took_s:.0f}, or keep the model loaded (OLLAMA_KEEP_ALIVE=-1)."
    return Finding(
        "warning",
        f"{sentence} A call is given up after {asked.settings.llm_timeout_s:g} s, and so is its load.",
        remedy,
        numbers,
    )


def _memory(asked: Asked, loaded: list[LoadedModel], *, by_us: bool) -> Iterator[Finding]:
    """Yield the window that the server really gives, and where the model lies; *by_us*: it was loaded for this."""
    entry = loaded_entry(asked.client, loaded)
    if entry is None:
        yield Finding("ok", f"{asked.model.name} is not loaded now; the first call of a run loads it.")
        return
    yield from given_window(asked.num_ctx, asked.facts.context_length, entry, by_us=by_us)
    if entry.size_bytes and entry.vram_bytes is not None:
        yield _spill(entry.size_bytes, entry.vram_bytes)


def _spill(size_bytes: int, vram_bytes: int) -> Finding:
    numbers = {"size_bytes": size_bytes, "vram_bytes": vram_bytes}
    remedy = "A smaller model, a stronger quantisation or a smaller OLLAMA_NUM_CTX fits more of it into the GPU."
    if vram_bytes >= size_bytes:
        return Finding("ok", f"The model lies in the GPU's memory ({size_bytes / 1e9:.1f} GB).", numbers=numbers)
    if vram_bytes == 0:
        sentence = f"The model runs on the CPU alone ({size_bytes / 1e9:.1f} GB): expect seconds or minutes per answer."
        return Finding("warning", sentence, "A GPU is many times faster; else choose a small model.", numbers)
    share = 1 - vram_bytes / size_bytes
    sentence = (
        f"{share:.0%} of the model ({size_bytes / 1e9:.1f} GB) lies outside the GPU's memory, which slows all of it."
    )
    return Finding("warning", sentence, remedy, numbers)


async def _classify(asked: Asked) -> Finding:
    """Label a conversation of our own on the way of a run: taxonomy, prompt, schema, request, validation."""
    try:
        taxonomy = load_taxonomy(asked.settings.taxonomy_file)
    except ConfigurationError:
        return Finding(
            "warning", "No test conversation was classified: the labels do not load.", "See the labels below."
        )
    prompts, parser = PromptBuilder.from_taxonomy(taxonomy), ReplyParser(taxonomy)
    try:
        outcome = await ollama_classify_async(aggregate_conversation(TEST_DOCUMENT), asked.client, prompts, parser)
    except LLMReplyError as exc:
        sentence = f"The model's answers to a test conversation are unusable, twice ({exc.reason}: {exc})."
        return Finding("error", sentence, "Take a larger model, or one that keeps to a JSON schema.")
    except LLMError as exc:
        return Finding("error", f"A test conversation got no answer: {exc}.", _remedy(exc, asked.settings))
    labels = outcome.classification
    numbers = {
        "intent": labels.intent,
        "topic": labels.topic,
        "sentiment": labels.sentiment,
        "attempts": outcome.attempts,
        "duration_s": outcome.duration_ms / 1000,
        "prompt_tokens": outcome.prompt_tokens,
        "reply_tokens": outcome.reply_tokens,
    }
    sentence = (
        f"A test conversation got valid labels in {outcome.duration_ms / 1000:.1f} s: "
        f"{labels.intent}, {labels.topic}, {labels.sentiment}"
    )
    if outcome.attempts > 1:
        return Finding("warning", f"{sentence}, but only when asked again.", "A larger model errs less.", numbers)
    return Finding("ok", f"{sentence}.", numbers=numbers)


def _slots(measured: Measurement, max_concurrent: object) -> Iterator[Finding]:
    slots, is_minimum = measured.slots, measured.is_minimum
    numbers = {
        "slots": slots,
        "slots_is_minimum": is_minimum,
        "enough_at_once": measured.enough,
        "max_concurrent": max_concurrent,
        "queue_wait_from": "server" if measured.levels[-1].queue_waits_s else "latency",
        "requests_per_s": {str(level.at_once): round(level.requests_per_s, 3) for level in measured.levels},
    }
    sentence = f"The server runs {'at least ' if is_minimum else ''}{slots} at once"
    if measured.stopped:
        yield Finding("warning", f"The probe stopped {measured.stopped}.", "Look at the server's log.", numbers)
    if not slots:
        sentence = "Even a request that was alone waited for a slot: other clients are using the server."
        yield Finding("warning", sentence, "Look again when it is idle; the slots could not be counted.", numbers)
    elif not isinstance(max_concurrent, int):
        yield Finding("ok", f"{sentence}.", numbers=numbers)
    elif max_concurrent > slots + 1 and not is_minimum:
        remedy = f"--max-concurrent {slots + 1}, or more slots: OLLAMA_NUM_PARALLEL={max_concurrent} for ollama serve."
        sentence += f", and MAX_CONCURRENT is {max_concurrent}: the others wait, and their time-out runs."
        yield Finding("warning", sentence, remedy, numbers)
    elif max_concurrent < slots:
        sentence += f", and MAX_CONCURRENT is {max_concurrent}: the others stay idle."
        yield Finding("warning", sentence, f"--max-concurrent {slots if is_minimum else slots + 1}.", numbers)
    else:
        yield Finding("ok", f"{sentence}; MAX_CONCURRENT {max_concurrent} fits.", numbers=numbers)


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _remedy(exc: LLMError, settings: Settings) -> str:
    by_kind = [remedy for kind, remedy in REMEDIES.items() if isinstance(exc, kind)]
    if by_kind:
        return by_kind[0]
    if settings.llm_api_url:
        return "Start it, or correct LLM_API_URL and, where the server wants a key, LLM_API_KEY; its log says more."
    if is_loopback(urlsplit(settings.server_url).hostname):
        return "Start it (ollama serve, or systemctl start ollama) and look at its log (journalctl -u ollama)."
    return "Look whether host and port are right, and whether a firewall is between; then at the server's log."
