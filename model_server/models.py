"""Chooses the model to ask, and parses what a model server reports about its models. No I/O.

Facts about Ollama: github.com/ollama/ollama, server/routes.go (``/api/tags``, ``/api/show``, ``/api/ps``), read at v0.33.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from config.settings import Protocol, Settings
from domain.server_reason import server_reason
from error_handler import ConfigurationError, LLMError, LLMUnavailableError
from model_server.chat import THINK_LEVEL, takes_levels_only
from model_server.protocol import DEFAULT_NUM_CTX, SEE_LOG, ChatTarget, ServerRequest, count, json_object, part

LOADED_TIMEOUT_S = 5.0
BEHIND_V1 = (
    "this is an Ollama: on /v1 it cuts long prompts without a word, and nobody can set its window; "
    "set OLLAMA_ENDPOINT and OLLAMA_MODEL instead of LLM_API_URL and LLM_MODEL"
)
NO_ROUTE = (404, 405, 501)
NO_LIST = (200, *NO_ROUTE)  # a server or proxy without the route, or with another body
# Lists of OpenAI's protocol have names only, and old ones of Ollama as well.
_EMBEDDING_NAME = re.compile(r"embed|minilm|rerank|(^|[/_-])(bge|gte|e5)[-_:]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model on the server; a *remote* one would send the text to another machine.

    *chats* is False if the list shows that it makes embeddings only. *owner* is OpenAI's ``owned_by``, empty if unknown.
    """

    name: str
    digest: str | None = None
    remote: bool = False
    chats: bool = True
    owner: str = ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The answer of ``/api/show``; None or empty if unknown. *context_length* is the model's own limit, tokens."""

    capabilities: frozenset[str] = field(default_factory=frozenset)
    context_length: int | None = None
    quantization: str | None = None
    parameter_size: str | None = None
    architecture: str = ""
    pools: bool = False  # the model makes one vector of a whole text

    @property
    def can_chat(self) -> bool:
        """False if the model makes embeddings only; Ollama reports capabilities from 0.6.4 on."""
        return "completion" in self.capabilities if self.capabilities else not self.pools

    @property
    def can_think(self) -> bool:
        """True if the model writes its reasoning unless the request disables that."""
        return "thinking" in self.capabilities


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory. *context_length* is the window that the server gave, tokens."""

    context_length: int | None
    size_bytes: int | None
    vram_bytes: int | None


# Yields requests, receives status and body of each answer, and returns the target to use. Both wrappers drive it.
TargetFlow = Generator[ServerRequest, tuple[int, bytes], ChatTarget]


def chat_target(settings: Settings, model: str) -> ChatTarget:
    """Return the target for *model* that *settings* describe. Raises ConfigurationError for a cloud model."""
    require_local(model, is_remote=is_cloud_name(model))
    return ChatTarget(
        protocol=settings.protocol,
        url=settings.chat_url,
        server_url=settings.server_url,
        model=model,
        api_key=settings.llm_api_key.get_secret_value() if settings.llm_api_key and settings.llm_api_url else None,
        num_ctx=settings.ollama_num_ctx or DEFAULT_NUM_CTX,
        keep_alive=settings.ollama_keep_alive,
    )


def find_target(target: ChatTarget, settings: Settings) -> TargetFlow:
    """Find the model that *settings* name: yield each request, receive its answer, return the target for the model.

    Raises:
        ConfigurationError: The server does not have the model; the message lists its models.
    """
    models = listed_models(target, *(yield models_request(target, settings.llm_timeout_s)))
    model = choose_model(settings, models)
    if target.protocol == "openai_chat":
        # Its answers show what the model can do.
        return replace(target, digest=model.digest, engine=model.owner)
    facts = parse_show(*(yield show_request(target.server_url, model.name, settings.llm_timeout_s)))
    if not facts.can_chat:
        raise ConfigurationError(
            f"{model.name} cannot chat: it is an embedding model. Set OLLAMA_MODEL or --model to one of: {chat_models(models)}."
        )
    return with_model(target, model, facts)


def with_model(target: ChatTarget, model: ServedModel, facts: ModelFacts) -> ChatTarget:
    """Return *target* with what the server reported about its model."""
    level = THINK_LEVEL if facts.can_think and takes_levels_only(model.name, facts.architecture) else ""
    return replace(
        target,
        digest=model.digest,
        disable_thinking=facts.can_think,
        think_level=level,
        context_limit=facts.context_length,
    )


def models_request(target: ChatTarget, timeout_s: float) -> ServerRequest:
    """Return the request that lists the server's models, whose answer also shows that the server is alive."""
    path = "/v1/models" if target.protocol == "openai_chat" else "/api/tags"
    return ServerRequest("GET", f"{target.server_url}{path}", None, timeout_s)


def parse_models(protocol: Protocol, status: int, body: bytes) -> list[ServedModel]:
    """Return the models that a server lists. Raises LLMUnavailableError if the answer is not a list of models."""
    if status != 200:
        key = "; check LLM_API_KEY" if status in (401, 403) and protocol == "openai_chat" else ""
        moved = "; it redirects, which is not followed: set the final address" if 300 <= status < 400 else ""
        said = server_reason(body) or SEE_LOG
        raise LLMUnavailableError(f"the model server did not list its models (HTTP {status}){key}{moved}{said}")
    listed, named = ("data", "id") if protocol == "openai_chat" else ("models", "name")
    models = []
    for entry in _entries(json_object(body), listed, named):
        digest, name = entry.get("digest"), entry[named]
        is_remote = bool(entry.get("remote_host") or entry.get("remote_model")) or is_cloud_name(name)
        chats = not _embeds(name, entry)
        owner = part(entry, "owned_by", str)
        models.append(ServedModel(name, digest if isinstance(digest, str) else None, is_remote, chats, owner))
    return models


_NONE_LISTED = ("none yet; run: ollama pull llama3.2", "the server lists none")


def listed_models(target: ChatTarget, status: int, body: bytes) -> list[ServedModel]:
    """Return the models that a server lists; none if a server with OpenAI's protocol has no list that can be read.

    A server that only emulates a part of Ollama may have no such route; then it has the model that *target* names.
    Raises LLMUnavailableError as ``parse_models`` does: the server failed, or is no Ollama.
    """
    try:
        return parse_models(target.protocol, status, body)
    except LLMUnavailableError:
        if target.protocol == "openai_chat" and status in NO_LIST:
            return []
        if status in NO_ROUTE and target.model:
            return [ServedModel(target.model)]
        raise


def choose_model(settings: Settings, models: list[ServedModel]) -> ServedModel:
    """Return the served model that *settings* name.

    Raises:
        ConfigurationError: No model is set, the server does not have it, or it is a cloud model. The message lists
            the server's models.
    """
    variable = "LLM_MODEL" if settings.llm_api_url else "OLLAMA_MODEL"
    listed = chat_models(models, _NONE_LISTED[settings.protocol == "openai_chat"])
    if settings.model is None:
        raise ConfigurationError(
            f"No model is set. Set {variable} or --model to one of the server's models ({listed})."
        )
    wanted = settings.model
    if settings.protocol == "openai_chat" and not models and not is_cloud_name(wanted):
        return ServedModel(wanted)  # the first answer shows whether the name is right
    if settings.protocol != "openai_chat" and ":" not in wanted.rsplit("/", 1)[-1]:
        wanted += ":latest"
    found = next((model for model in models if model.name in (settings.model, wanted)), None)
    is_remote = is_cloud_name(settings.model) or (found is not None and found.remote)
    require_local(settings.model, is_remote=is_remote, hint=f" ({listed})")
    if found is None:
        raise ConfigurationError(
            f"The model server has no model {settings.model}. Set {variable} or --model to one of: {listed}."
        )
    return found


def chat_models(models: list[ServedModel], none: str = _NONE_LISTED[0]) -> str:
    """Return the names of those *models* that may be asked, for messages, or *none*."""
    names = [model.name for model in models if model.chats and not model.remote]
    return ", ".join(names) if names else none


def _embeds(name: str, entry: dict[str, Any]) -> bool:
    """Return whether a model that a server lists as *entry* only makes embeddings: by its abilities, family or name."""
    if capabilities := part(entry, "capabilities", list):
        return "completion" not in capabilities
    family = part(part(entry, "details", dict), "family", str)
    return family.endswith("bert") or _EMBEDDING_NAME.search(name) is not None


def require_local(model: str, *, is_remote: bool, hint: str = "") -> None:
    """Raise ConfigurationError if *model* runs on another machine; *hint* lists the local ones."""
    if is_remote:
        raise ConfigurationError(
            f"{model} runs in Ollama's cloud: customer text would leave your network. Use a local model{hint}."
        )


def parse_version(status: int, body: bytes) -> str | None:
    """Return the version from ``/api/version``; None if the server has no such route."""
    return part(_fields(status, body), "version", str) or None


def find_ollama(target: ChatTarget) -> Generator[ServerRequest, tuple[int, bytes], str | None]:
    """Return the version of the Ollama at the address of *target*; None if another server is there, or none answers."""
    try:
        return parse_version(*(yield ServerRequest("GET", f"{target.server_url}/api/version", None, LOADED_TIMEOUT_S)))
    except LLMError:
        return None


def show_body(model: str) -> bytes:
    """Return the body of ``POST /api/show``."""
    return orjson.dumps({"model": model})


def show_request(server_url: str, model: str, timeout_s: float) -> ServerRequest:
    """Return the request that asks Ollama about *model*."""
    return ServerRequest("POST", f"{server_url}/api/show", show_body(model), timeout_s)


def parse_show(status: int, body: bytes) -> ModelFacts:
    """Return the facts from ``/api/show``; empty if the server refuses or has no such route."""
    fields = _fields(status, body)
    details, info = part(fields, "details", dict), part(fields, "model_info", dict)
    limits = [value for name, value in info.items() if name.endswith(".context_length")]
    return ModelFacts(
        frozenset(name for name in part(fields, "capabilities", list) if isinstance(name, str)),
        count(limits[0]) if limits else None,
        part(details, "quantization_level", str) or None,
        part(details, "parameter_size", str) or None,
        part(info, "general.architecture", str),
        any(name.endswith(".pooling_type") for name in info),
    )


def find_loaded(model: str, status: int, body: bytes) -> LoadedModel | None:
    """Return the entry of *model* in the answer of ``/api/ps``; None if it is not loaded or the server does not tell."""
    for entry in _entries(_fields(status, body), "models", "name"):
        if entry["name"] in (model, f"{model}:latest"):
            sizes = count(entry.get("size")), count(entry.get("size_vram", 0))
            return LoadedModel(count(entry.get("context_length")), *sizes)
    return None


def loaded_request(server_url: str) -> ServerRequest:
    """Return the request that lists Ollama's loaded models."""
    return ServerRequest("GET", f"{server_url}/api/ps", None, LOADED_TIMEOUT_S)


def is_cloud_name(model: str) -> bool:
    """Return whether Ollama would send requests for *model* to its cloud."""
    tag = model.rsplit(":", 1)[-1].lower() if ":" in model else ""
    return tag == "cloud" or tag.endswith("-cloud")


def _fields(status: int, body: bytes) -> dict[str, Any]:
    """Return the object of an answer that a run can do without; empty if there is none."""
    try:
        return json_object(body) if status == 200 else {}
    except LLMUnavailableError:  # a page for people, of a server that only emulates Ollama
        return {}


def _entries(fields: dict[str, Any], listed: str, named: str) -> list[dict[str, Any]]:
    """Return the objects in the list *listed* of *fields* that have a text in *named*."""
    entries = part(fields, listed, list)
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get(named), str)]
