"""Requests to model servers of three protocols, and their lists of models: pure functions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from config import Settings, load_settings
from config.settings import Protocol
from error_handler import ConfigurationError, LLMUnavailableError
from model_server.models import (
    LoadedModel,
    ModelFacts,
    ServedModel,
    chat_target,
    choose_model,
    find_loaded,
    models_request,
    parse_models,
    parse_show,
    show_body,
    with_model,
)
from model_server.protocol import SEED, ChatTarget, build_chat_body, plan_fingerprint

SCHEMA = b'{"type": "object"}'
MESSAGES = [{"role": "system", "content": "Label it."}, {"role": "user", "content": "Customer: where is it?"}]
TARGET = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "llama3.2", None, 8192, "10m")
GENERATE = replace(TARGET, protocol="ollama_generate", url="http://m:1/api/generate")
OPENAI = replace(TARGET, protocol="openai_chat", url="http://m:1/v1/chat/completions", api_key="sk-secret")
TARGETS = {"ollama_chat": TARGET, "ollama_generate": GENERATE, "openai_chat": OPENAI}


def body_of(target: ChatTarget, attempt: int = 0) -> dict[str, Any]:
    body = json.loads(build_chat_body(target, MESSAGES, SCHEMA, attempt))
    assert isinstance(body, dict)
    return body


# Requests


def test_chat_body() -> None:
    """Each option is explicit, so that no default of the server applies."""
    assert body_of(TARGET) == {
        "model": "llama3.2",
        "messages": MESSAGES,
        "stream": False,
        "format": {"type": "object"},
        "options": {"temperature": 0, "seed": SEED, "num_ctx": 8192, "num_predict": 700},
        "keep_alive": "10m",
        "truncate": False,
        "shift": False,
    }


def test_generate_body() -> None:
    """The same, with system text and prompt in place of messages."""
    chat, generate = body_of(TARGET), body_of(GENERATE)
    assert generate.pop("system") == "Label it."
    assert generate.pop("prompt") == "Customer: where is it?"
    assert chat.pop("messages") == MESSAGES
    assert generate == chat


def test_generate_body_of_a_repair_turn() -> None:
    """All turns after the constant part are in the prompt, in order."""
    turns = [*MESSAGES, {"role": "assistant", "content": "oops"}, {"role": "user", "content": "Again."}]
    assert json.loads(build_chat_body(GENERATE, turns, SCHEMA))["prompt"] == "Customer: where is it?\n\noops\n\nAgain."


def test_openai_body() -> None:
    """Options that the protocol does not have are left out."""
    assert body_of(OPENAI) == {
        "model": "llama3.2",
        "messages": MESSAGES,
        "stream": False,
        "temperature": 0,
        "seed": SEED,
        "max_tokens": 700,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "triad", "strict": True, "schema": {"type": "object"}},
        },
    }


@pytest.mark.parametrize("protocol", TARGETS)
def test_attempt_changes_only_the_seed(protocol: str) -> None:
    """A repeated request can get another answer and does not reload the model."""
    first, second = (json.dumps(body_of(TARGETS[protocol], attempt)) for attempt in (0, 3))
    assert first != second
    assert first.replace(str(SEED), str(SEED + 3)) == second


@pytest.mark.parametrize("protocol", ["ollama_chat", "ollama_generate"])
def test_thinking_is_disabled_if_the_model_can_think(protocol: str) -> None:
    """Other models get no such option."""
    target = TARGETS[protocol]
    assert "think" not in body_of(target)
    assert body_of(replace(target, disable_thinking=True))["think"] is False


@pytest.mark.parametrize(("setting", "sent"), [("10m", "10m"), ("300", 300), ("-1", -1), ("0", 0), ("-5m", "-5m")])
def test_keep_alive_is_a_number_or_a_duration(setting: str, sent: Any) -> None:
    """The server refuses a number in quotes: a duration without a unit."""
    assert body_of(replace(TARGET, keep_alive=setting))["keep_alive"] == sent


def test_headers() -> None:
    """The key is sent as a bearer token."""
    assert OPENAI.headers["Authorization"] == "Bearer sk-secret"
    assert "Authorization" not in TARGET.headers


def test_no_secret_in_a_repr() -> None:
    """Targets appear in tracebacks and debug lines."""
    assert "sk-secret" not in repr(OPENAI)
    assert "sk-secret" not in f"{OPENAI} {[OPENAI]}"


@pytest.mark.parametrize(
    ("environment", "protocol", "url", "api_key"),
    [
        ({}, "ollama_chat", "http://localhost:11434/api/chat", None),
        ({"OLLAMA_ENDPOINT": "http://gpu:1/"}, "ollama_chat", "http://gpu:1/api/chat", None),
        ({"LLM_API_URL": "http://x/y/api/generate"}, "ollama_generate", "http://x/y/api/generate", "k"),
        ({"LLM_API_URL": "https://x/v1/chat/completions"}, "openai_chat", "https://x/v1/chat/completions", "k"),
    ],
)
def test_target_of_settings(environment: dict[str, str], protocol: str, url: str, api_key: str | None) -> None:
    """The key belongs to LLM_API_URL and is never sent to another server."""
    names = {"OLLAMA_ENDPOINT": "ollama_endpoint", "LLM_API_URL": "llm_api_url"}
    given = {names[name]: value for name, value in environment.items()}
    target = chat_target(load_settings(None, llm_api_key="k", **given), "m")
    assert (target.protocol, target.url, target.api_key) == (protocol, url, api_key)
    assert target.url.startswith(target.server_url)
    assert not target.server_url.endswith("/")


# Models


def settings_for(**given: Any) -> Settings:
    return load_settings(None, **given)


LISTED = [
    ServedModel("nomic-embed-text:latest"),
    ServedModel("llama3.2:latest", "sha256:1"),
    ServedModel("qwen3:8b", "sha256:2"),
    ServedModel("library/phi4:latest"),
    ServedModel("gpt-oss:120b-cloud", remote=True),
    ServedModel("looks-local:latest", remote=True),
]


def test_parse_models_of_ollama() -> None:
    """A remote model is recognised by its host, whatever its name."""
    fields = {
        "models": [
            {"name": "llama3.2:latest", "model": "llama3.2:latest", "digest": "abc", "size": 1},
            {"name": "mine:latest", "digest": "def", "remote_host": "https://ollama.com:443"},
            {"name": "ours:latest", "remote_model": "gpt-oss:120b"},
            {"name": "gpt-oss:120b-cloud", "digest": ""},
        ]
    }
    assert parse_models("ollama_chat", 200, json.dumps(fields).encode()) == [
        ServedModel("llama3.2:latest", "abc"),
        ServedModel("mine:latest", "def", remote=True),
        ServedModel("ours:latest", None, remote=True),
        ServedModel("gpt-oss:120b-cloud", "", remote=True),
    ]


def test_parse_models_of_openai() -> None:
    """The other protocol lists them under other names."""
    fields = {"object": "list", "data": [{"id": "local-model", "object": "model"}, {"id": "gpt-oss:cloud"}]}
    assert parse_models("openai_chat", 200, json.dumps(fields).encode()) == [
        ServedModel("local-model"),
        ServedModel("gpt-oss:cloud", remote=True),
    ]


@pytest.mark.parametrize(
    "models", [None, [], {}, "x", [None, 3, "x", [], {}, {"name": None}, {"name": 5}, {"digest": "a"}]]
)
def test_malformed_models_are_ignored(models: Any) -> None:
    """An empty server says null."""
    assert parse_models("ollama_chat", 200, json.dumps({"models": models}).encode()) == []


@pytest.mark.parametrize(("status", "body"), [(500, b"{}"), (404, b""), (200, b"<html>"), (200, b"[]"), (200, b"")])
@pytest.mark.parametrize("protocol", TARGETS)
def test_unreadable_model_list_is_an_error(status: int, body: bytes, protocol: Protocol) -> None:
    """The server at this address is not a model server."""
    with pytest.raises(LLMUnavailableError):
        parse_models(protocol, status, body)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("llama3.2", "llama3.2:latest"),
        ("llama3.2:latest", "llama3.2:latest"),
        ("qwen3:8b", "qwen3:8b"),
        ("library/phi4", "library/phi4:latest"),
    ],
)
def test_model_without_a_tag_means_latest(named: str, found: str) -> None:
    """Names with a tag or a namespace are matched as well."""
    assert choose_model(settings_for(ollama_model=named), LISTED).name == found


def test_model_name_of_an_openai_server_is_exact() -> None:
    """No tag is added."""
    settings = settings_for(llm_api_url="http://x/v1/chat/completions", llm_model="a", ollama_model="b")
    assert choose_model(settings, [ServedModel("a:latest"), ServedModel("a")]).name == "a"
    with pytest.raises(ConfigurationError, match="LLM_MODEL"):
        choose_model(settings, [ServedModel("a:latest")])


@pytest.mark.parametrize("named", [None, "qwen3", "missing"])
def test_missing_model_error_lists_the_local_models(named: str | None) -> None:
    """Remote models are not listed."""
    with pytest.raises(ConfigurationError) as caught:
        choose_model(settings_for(ollama_model=named), LISTED)
    message = str(caught.value)
    assert "OLLAMA_MODEL" in message
    assert "llama3.2:latest, qwen3:8b" in message
    assert "gpt-oss" not in message
    assert "looks-local" not in message


def test_missing_model_error_shows_ollama_pull_if_there_are_none() -> None:
    """The message has the command to run."""
    with pytest.raises(ConfigurationError, match="ollama pull"):
        choose_model(settings_for(ollama_model="llama3.2"), [])


@pytest.mark.parametrize("named", ["gpt-oss:120b-cloud", "x:cloud", "x:CLOUD", "x:1b-Cloud", "looks-local"])
def test_cloud_models_are_refused(named: str) -> None:
    """By name or by the server's report: customer text must not leave the network."""
    with pytest.raises(ConfigurationError, match="leave your network"):
        choose_model(settings_for(ollama_model=named), LISTED)


@pytest.mark.parametrize("protocol", TARGETS)
def test_cloud_names_are_refused_before_any_request(protocol: str) -> None:
    """No target can be created for them."""
    given = {} if protocol == "ollama_chat" else {"llm_api_url": TARGETS[protocol].url}
    with pytest.raises(ConfigurationError, match="leave your network"):
        chat_target(settings_for(**given), "gpt-oss:120b-cloud")


@pytest.mark.parametrize("named", ["cloudy:7b", "cloud", "my-cloud:7b", "host:5000/cloud"])
def test_names_that_contain_cloud_are_local_without_the_tag(named: str) -> None:
    """Only the tag counts."""
    assert chat_target(settings_for(), named).model == named


@pytest.mark.parametrize(
    ("status", "fields", "thinks"),
    [
        (200, {"capabilities": ["completion", "thinking"]}, True),
        (200, {"capabilities": ["completion"]}, False),
        (200, {"capabilities": "thinking"}, False),
        (200, {}, False),
        (404, {"error": "model 'x' not found"}, False),
    ],
)
def test_show_reports_whether_a_model_can_think(status: int, fields: dict[str, Any], thinks: bool) -> None:
    """From the capabilities in /api/show."""
    assert parse_show(status, json.dumps(fields).encode()).can_think is thinks


def test_show_reports_limit_and_size() -> None:
    """/api/show has the model's own limit under the name of its architecture."""
    fields = {
        "capabilities": ["completion"],
        "details": {"quantization_level": "Q4_K_M", "parameter_size": "3.2B"},
        "model_info": {"general.architecture": "llama", "llama.context_length": 131072},
    }
    expected = ModelFacts(frozenset({"completion"}), 131072, "Q4_K_M", "3.2B", "llama")
    assert parse_show(200, json.dumps(fields).encode()) == expected
    for odd in ({"model_info": [], "details": "?"}, {"model_info": {"llama.context_length": "long"}}):
        assert parse_show(200, json.dumps(odd).encode()) == ModelFacts()


def test_loaded_models_have_window_and_memory() -> None:
    """/api/ps reports the window that the server gave; it leaves out size_vram if it is 0."""
    entry = {"name": "llama3.2:latest", "digest": "abc", "size": 10, "size_vram": 4, "context_length": 8192}
    body = json.dumps({"models": [entry, {"name": "cpu:latest", "size": 7}, {"name": 3}, None]}).encode()
    for name in ("llama3.2", "llama3.2:latest"):
        assert find_loaded(name, 200, body) == LoadedModel(8192, 10, 4)
    assert find_loaded("cpu", 200, body) == LoadedModel(None, 7, 0)
    assert find_loaded("other", 200, body) is None
    assert find_loaded("cpu", 500, b"{}") is None


def test_model_list_address_and_show_body() -> None:
    """The address that lists models, and the body that asks about one."""
    assert models_request(TARGET, 5.0).url == "http://m:1/api/tags"
    assert models_request(OPENAI, 5.0).url == "http://m:1/v1/models"
    assert json.loads(show_body("llama3.2")) == {"model": "llama3.2"}


def test_target_gets_the_facts_of_its_model() -> None:
    """Nothing else changes, so a run never reloads the model."""
    target = with_model(TARGET, ServedModel("llama3.2:latest", "sha256:1"), ModelFacts(frozenset({"thinking"})))
    assert target == replace(TARGET, digest="sha256:1", disable_thinking=True)


def test_fingerprint_covers_everything_that_decides_an_answer() -> None:
    """Model, digest, options, prompt and schema; not the address, the key, or the window, which each run chooses."""
    base = plan_fingerprint(TARGET, "prompt", SCHEMA)
    assert plan_fingerprint(replace(TARGET, num_ctx=4096, context_limit=4096), "prompt", SCHEMA) == base
    assert plan_fingerprint(replace(TARGET, server_url="http://other", api_key="k"), "prompt", SCHEMA) == base
    others = [
        plan_fingerprint(replace(TARGET, model="other"), "prompt", SCHEMA),
        plan_fingerprint(replace(TARGET, digest="sha256:2"), "prompt", SCHEMA),
        plan_fingerprint(TARGET, "another prompt", SCHEMA),
        plan_fingerprint(TARGET, "prompt", b"{}"),
        plan_fingerprint(GENERATE, "prompt", SCHEMA),
    ]
    assert len({base, *others}) == 6
