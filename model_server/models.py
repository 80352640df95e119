"""What a model server says about itself and its models, as pure functions.

Facts about Ollama: github.com/ollama/ollama, server/routes.go (``/api/tags``, ``/api/show``, ``/api/ps``), read at v0.33.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from config.settings import Protocol, Settings
from error_handler import ConfigurationError, LLMUnavailableError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model the server has; *remote* ones would send the text to another machine."""

    name: str
    digest: str | None = None
    remote: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What ``/api/show`` says; None and empty where it says nothing. *context_length* in tokens is the model's own limit."""

    capabilities: frozenset[str] = field(default_factory=frozenset)
    context_length: int | None = None
    quantization: str | None = None
    parameter_size: str | None = None

    @property
    def can_think(self) -> bool:
        """Whether the model writes down its thoughts unless it is told not to."""
        return "thinking" in self.capabilities


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One entry of ``/api/ps``. *context_length* is the window that the server really gave, in tokens."""

    name: str
    digest: str | None
    context_length: int | None
    size_bytes: int | None
    vram_bytes: int | None


def models_url(target_protocol: Protocol, server_url: str) -> str:
    """Return the address that lists the server's models; it also tells whether the server is alive."""
    return f"{server_url}/v1/models" if target_protocol == "openai_chat" else f"{server_url}/api/tags"


def parse_models(protocol: Protocol, status: int, body: bytes) -> list[ServedModel]:
    """Return the models a server lists.

    Raises:
        LLMUnavailableError: The answer is not such a list.
    """
    if status != 200:
        raise LLMUnavailableError(f"the model server does not list its models (HTTP {status})")
    fields = json_object(body)
    entries = fields.get("data" if protocol == "openai_chat" else "models")
    models = []
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("id" if protocol == "openai_chat" else "name") if isinstance(entry, dict) else None
        if isinstance(name, str):
            digest = entry.get("digest")
            remote = bool(entry.get("remote_host") or entry.get("remote_model")) or is_cloud_name(name)
            models.append(ServedModel(name, digest if isinstance(digest, str) else None, remote))
    return models


def choose_model(settings: Settings, models: list[ServedModel]) -> ServedModel:
    """Return the served model that *settings* name.

    Raises:
        ConfigurationError: None is named, the server does not have it, or it is a cloud model.
            The message lists what the server has.
    """
    variable = "LLM_MODEL" if settings.llm_api_url else "OLLAMA_MODEL"
    local = [model.name for model in models if not model.remote]
    listed = ", ".join(local) if local else "none yet; run: ollama pull llama3.2"
    if settings.model is None:
        raise ConfigurationError(
            f"No model is named: set {variable} or --model to one of the server's models ({listed})."
        )
    wanted = settings.model
    if settings.protocol != "openai_chat" and ":" not in wanted.rsplit("/", 1)[-1]:
        wanted += ":latest"
    found = next((model for model in models if model.name in (settings.model, wanted)), None)
    if is_cloud_name(settings.model) or (found is not None and found.remote):
        raise ConfigurationError(
            f"{settings.model} runs in Ollama's cloud, so customer text would leave this house; name a local model ({listed})."
        )
    if found is None:
        raise ConfigurationError(
            f"The model server has no model {settings.model}; set {variable} or --model to one of: {listed}."
        )
    return found


def parse_version(status: int, body: bytes) -> str | None:
    """Return what ``/api/version`` says; None where the server has no such route."""
    return _text(json_object(body).get("version")) if status == 200 else None


def show_body(model: str) -> bytes:
    """Return the body of ``POST /api/show``."""
    return orjson.dumps({"model": model})


def parse_show(status: int, body: bytes) -> ModelFacts:
    """Return what ``/api/show`` says; nothing where it refuses to say."""
    if status != 200:
        return ModelFacts()
    fields = json_object(body)
    capabilities, details, info = fields.get("capabilities"), fields.get("details"), fields.get("model_info")
    details = details if isinstance(details, dict) else {}
    lengths = (
        [value for name, value in info.items() if name.endswith(".context_length")] if isinstance(info, dict) else []
    )
    return ModelFacts(
        frozenset(name for name in capabilities if isinstance(name, str))
        if isinstance(capabilities, list)
        else frozenset(),
        count(lengths[0]) if lengths else None,
        _text(details.get("quantization_level")),
        _text(details.get("parameter_size")),
    )


def parse_loaded(status: int, body: bytes) -> list[LoadedModel]:
    """Return the models that ``/api/ps`` says are loaded; none where it refuses to say."""
    entries = json_object(body).get("models") if status == 200 else None
    return [
        LoadedModel(
            entry["name"],
            _text(entry.get("digest")),
            count(entry.get("context_length")),
            count(entry.get("size")),
            count(entry.get("size_vram", 0)),
        )
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    ]


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in *body*; raise LLMUnavailableError where there is none."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise LLMUnavailableError("the model server's answer is not JSON, or was cut on its way") from exc
    if not isinstance(fields, dict):
        raise LLMUnavailableError("the model server's answer is not a JSON object")
    return fields


def count(value: Any) -> int | None:
    """Return *value* where it is a whole number of at least 0, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def is_cloud_name(model: str) -> bool:
    """Whether Ollama would send what *model* is asked to its cloud."""
    tag = model.rsplit(":", 1)[-1].lower() if ":" in model else ""
    return tag == "cloud" or tag.endswith("-cloud")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
