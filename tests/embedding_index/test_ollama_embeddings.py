"""The Ollama provider against a server process that speaks, and fails, as Ollama does."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from config.index_settings import load_index_settings
from config.settings import load_settings
from embedding_index.providers.contract import ModelIdentity, RequestLimits, checked_vectors
from embedding_index.providers.ollama_embeddings import OllamaProvider
from error_handler import (
    ConfigurationError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    TriadError,
    UnusableVectorsError,
)
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama, fake_embedding
from tests.fakes.scripted_server import Handler, Step, answer, drip_header, reset, scripted_server

TEXTS = ["my red card", "Rückerstattung 💶", "orders: id integer"]
SECRET = "Ms Smith of 12 Hill Road"


loaded_settings = functools.cache(load_settings)


def open_ollama(url: str, **settings: Any) -> OllamaProvider:
    return OllamaProvider(
        load_index_settings(None, provider="ollama", **settings), loaded_settings(None, ollama_endpoint=url)
    )


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOllama]:
    with FakeOllama() as started:
        yield started


@pytest.fixture
def fake(running: FakeOllama) -> Iterator[FakeOllama]:
    running.reset()
    yield running
    assert running.stats()["internal_errors"] == 0


@pytest.fixture
def provider(fake: FakeOllama) -> Iterator[OllamaProvider]:
    with closing(open_ollama(fake.url)) as opened:
        yield opened


def strike(fake: FakeOllama, kind: str, **parameters: Any) -> None:
    fake.configure(faults=[{"kind": kind, "when": {"path": "/api/embed"}, **parameters}])


def test_vectors_and_what_is_known_of_the_model(provider: OllamaProvider) -> None:
    got = provider.embed(TEXTS)
    for text, vector in zip(TEXTS, got.vectors, strict=True):
        np.testing.assert_allclose(vector, fake_embedding(text, 768), atol=1e-6)
    assert got.tokens == sum(-(-len(text) // 4) for text in TEXTS)
    assert provider.limits == RequestLimits(2048, 2048, None)
    assert provider.identity == ModelIdentity("ollama", "nomic-embed-text", None)
    assert not provider.is_external


def test_it_says_when_a_good_answer_is_there(fake: FakeOllama, provider: OllamaProvider) -> None:
    """Before its numbers are read; a refusal frees no slot."""
    said: list[str] = []
    provider.embed(TEXTS, lambda: said.append("good"))
    strike(fake, "busy_503")
    with pytest.raises(ProviderBusyError):
        provider.embed(TEXTS, lambda: said.append("busy"))
    assert said == ["good"]


def test_each_call_asks_for_the_same_context_without_truncation() -> None:
    """Another window would reload the model; without ``truncate: false`` Ollama cuts in silence."""
    vectors = answer({"embeddings": [[1.0]], "prompt_eval_count": 3})
    with scripted_server(vectors, vectors) as server:
        server.show = answer({"model_info": {"general.architecture": "bert", "bert.context_length": 512}})
        with closing(open_ollama(server.url, embedding_model="all-minilm:latest")) as provider:
            provider.embed(["a"])
            provider.embed(["b"])
    first, second = (request.json for request in server.requests if request.path == "/api/embed")
    assert first == {
        "model": "all-minilm:latest",
        "input": ["a"],
        "truncate": False,
        "keep_alive": "10m",
        "options": {"num_ctx": 512},
    }
    assert second == first | {"input": ["b"]}
    assert provider.limits.input_tokens == 512
    assert provider.identity.model == "all-minilm"


@pytest.mark.parametrize(("context", "limit"), [(32_768, 8192), (None, 2048)])
def test_the_longest_input(context: int | None, limit: int) -> None:
    with scripted_server() as server:
        server.show = answer({"model_info": {"qwen3.context_length": context}})
        with closing(open_ollama(server.url)) as provider:
            assert provider.limits.input_tokens == limit


@pytest.mark.parametrize("model", ["mxbai-embed-large", "no model"])
def test_missing_model_error_names_the_pull_command(fake: FakeOllama, model: str) -> None:
    with pytest.raises(ConfigurationError, match=f"ollama pull {model}"):
        open_ollama(fake.url, embedding_model=model)


@pytest.mark.parametrize("model", ["gpt-oss:120b-cloud", "disguised"])
def test_cloud_models_are_refused(fake: FakeOllama, model: str) -> None:
    """By their name, and by what the server says about them."""
    fake.configure(models=[{"name": "disguised", "remote_host": "https://ollama.com:443", "remote_model": "x"}])
    with pytest.raises(ConfigurationError, match="leave your network"):
        open_ollama(fake.url, embedding_model=model)
    assert fake.stats()["embed_requests"] == 0


def test_no_server() -> None:
    with pytest.raises(ProviderUnavailableError, match="ollama serve"):
        open_ollama("http://127.0.0.1:9")


def test_dimensions_are_not_for_ollama(fake: FakeOllama) -> None:
    with pytest.raises(ConfigurationError, match="EMBEDDING_DIMENSIONS"):
        open_ollama(fake.url, dimensions=64)


def test_two_calls_at_once_unless_it_is_set(fake: FakeOllama, provider: OllamaProvider) -> None:
    assert provider.max_concurrent == 2
    for count in (1, 7):
        with closing(open_ollama(fake.url, max_concurrent=count)) as other:
            assert other.max_concurrent == count


def inside(text: str) -> dict[str, Any]:
    """EmbedHandler answers every error with HTTP 400."""
    return {"kind": "status", "status": 400, "body": f'{{"error": "{text}"}}'}


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ({"kind": "busy_503"}, ProviderBusyError, "busy"),
        ({"kind": "status", "status": 429}, ProviderBusyError, "busy"),
        ({"kind": "model_not_found_404"}, ConfigurationError, "ollama pull"),
        ({"kind": "status", "status": 404, "body": "404 page not found"}, ConfigurationError, "OLLAMA_ENDPOINT"),
        ({"kind": "status", "status": 405}, ConfigurationError, "OLLAMA_ENDPOINT"),
        ({"kind": "status", "status": 401}, ConfigurationError, "OLLAMA_ENDPOINT"),
        ({"kind": "status", "status": 307}, ConfigurationError, "OLLAMA_ENDPOINT"),
        (inside("this model does not support embeddings"), ConfigurationError, "EMBEDDING_MODEL"),
        (
            {"kind": "status", "status": 500, "body": '{"error": "this model does not support embeddings"}'},
            ConfigurationError,
            "EMBEDDING_MODEL",
        ),
        (inside("the input length exceeds the context length"), ProviderRejectedError, "longer"),
        ({"kind": "overflow_400"}, ProviderRejectedError, "longer"),
        ({"kind": "embed_nan_400"}, ProviderRejectedError, "no vector"),
        (inside("something new"), ProviderRejectedError, "400"),
        (inside("do embedding request: Post http://127.0.0.1:1/embedding: EOF"), ProviderUnavailableError, "400"),
        (inside("model runner has unexpectedly stopped"), ProviderUnavailableError, "400"),
        ({"kind": "runner_stopped_500"}, ProviderUnavailableError, "500"),
        ({"kind": "load_failed_500"}, ProviderUnavailableError, "500"),
        ({"kind": "runner_crash"}, ProviderUnavailableError, "500"),
        ({"kind": "canceled_499"}, ProviderUnavailableError, "499"),
        ({"kind": "html_502"}, ProviderUnavailableError, "502"),
        ({"kind": "html_200"}, ProviderUnavailableError, "JSON"),
        ({"kind": "half_json"}, ProviderUnavailableError, "JSON"),
        ({"kind": "close"}, ProviderUnavailableError, "OLLAMA_ENDPOINT"),
        ({"kind": "reset_after"}, ProviderUnavailableError, "OLLAMA_ENDPOINT"),
        ({"kind": "garbage"}, ProviderUnavailableError, "OLLAMA_ENDPOINT"),
        ({"kind": "truncated_body"}, ProviderUnavailableError, "OLLAMA_ENDPOINT"),
    ],
    ids=lambda value: str(value.get("body") or value.get("status", value["kind"])) if isinstance(value, dict) else "",
)
def test_each_fault_is_one_of_our_errors_and_one_request(
    fake: FakeOllama, provider: OllamaProvider, fault: dict[str, Any], error: type[TriadError], words: str
) -> None:
    strike(fake, **fault)
    with pytest.raises(error, match=words) as caught:
        provider.embed(TEXTS)
    assert type(caught.value) is error
    assert fake.stats()["embed_requests"] == 1


@pytest.mark.parametrize("era", ["new", "old"])
def test_a_chat_model_is_named_as_the_cause(fake: FakeOllama, era: str) -> None:
    """From 0.30 on each model is served by a llama-server, which answers 501; before, each model made vectors."""
    fake.configure(era=era)
    with closing(open_ollama(fake.url, embedding_model="llama3.2")) as opened:
        if era == "old":
            assert len(opened.embed(TEXTS).vectors) == 3
            return
        with pytest.raises(ConfigurationError, match=r"llama3\.2 makes no embeddings in Ollama; set EMBEDDING_MODEL"):
            opened.embed(TEXTS)


@pytest.mark.parametrize(
    ("status", "reason"),
    mostly_thorough(
        [
            (400, "cannot embed"),
            (400, "invalid input type"),
            (401, "forbidden"),
            (400, "the input length exceeds the context length"),
            (400, "does not support embeddings"),
            (400, "runner failed on"),
            (404, "cannot embed"),
            (404, "model not found"),
            (503, "busy"),
            (500, "cannot embed"),
        ],
        3,
    ),
)
def test_errors_do_not_quote_what_the_server_quotes(
    fake: FakeOllama, provider: OllamaProvider, status: int, reason: str
) -> None:
    """Whatever the refusal is about, and neither in capitals nor in lower case."""
    strike(fake, "status", status=status, body=f'{{"error": "{reason}: {SECRET}"}}')
    with pytest.raises(TriadError) as caught:
        provider.embed([SECRET])
    assert SECRET.casefold() not in str(caught.value).casefold()


@pytest.mark.parametrize("status", mostly_thorough([400, 401, 404, 422, 429, 500, 501, 503], 5))
def test_errors_have_the_reason_of_the_server(fake: FakeOllama, provider: OllamaProvider, status: int) -> None:
    strike(fake, "status", status=status, body='{"error": "input 3 has no tokens"}')
    with pytest.raises(TriadError, match="; the server says: input 3 has no tokens"):
        provider.embed(["Where is it?"])
    strike(fake, "status", status=status, body="")
    with pytest.raises(TriadError, match="; its log may say why"):
        provider.embed(["Where is it?"])


@pytest.mark.parametrize(
    ("step", "scheme", "words"),
    [(reset, "http", "closed the connection before"), (reset, "https", "no TLS connection to https://")],
)
def test_start_it_is_said_only_without_a_connection(step: Step, scheme: str, words: str) -> None:
    with scripted_server() as server:
        server.show = step
        with pytest.raises(ProviderUnavailableError, match=words) as caught:
            open_ollama(server.url.replace("http", scheme))
    assert "start it" not in str(caught.value)


@pytest.mark.parametrize(
    "fault", [{"kind": "hang"}, {"kind": "slow_body", "bytes_per_s": 20}], ids=["silence", "drips"]
)
def test_the_time_out_is_of_the_whole_answer(fake: FakeOllama, fault: dict[str, Any]) -> None:
    """A body that drips sends something all the time: no time-out of a single read ends it."""
    strike(fake, **fault)
    with closing(open_ollama(fake.url, timeout_s=0.5)) as provider:
        start = time.monotonic()
        with pytest.raises(ProviderUnavailableError, match="EMBEDDING_TIMEOUT_S"):
            provider.embed(TEXTS)
    assert time.monotonic() - start < 30, "the body takes half an hour"


def test_a_header_that_drips_is_given_up() -> None:
    with scripted_server(drip_header(0.05, 100)) as server:
        with (
            closing(open_ollama(server.url, timeout_s=0.5)) as provider,
            pytest.raises(ProviderUnavailableError, match="EMBEDDING_TIMEOUT_S"),
        ):
            provider.embed(["a"])
        assert server.client_left.wait(30)
        assert not server.dripped_to_the_end


def test_one_connection_carries_one_call_after_the_other() -> None:
    """The time-out of an answer ends with it: the next one has its own."""
    peers = []

    def noted(handler: Handler) -> None:
        peers.append(handler.client_address)
        answer({"embeddings": [[1.0]], "prompt_eval_count": 1})(handler)

    with scripted_server(noted, noted, noted) as server, closing(open_ollama(server.url)) as provider:
        for text in "abc":
            provider.embed([text])
    assert len(peers) == 3
    assert len(set(peers)) == 1


def test_too_long_an_input_is_refused_and_not_cut(fake: FakeOllama, provider: OllamaProvider) -> None:
    with pytest.raises(ProviderRejectedError, match="longer"):
        provider.embed(["short", "long " * 4000])


def test_truncation_by_the_server_is_detected(fake: FakeOllama, provider: OllamaProvider) -> None:
    """By its count of tokens: fewer than the text has words."""
    fake.configure(ignore_truncate=True)
    with pytest.raises(UnusableVectorsError, match="truncated an input"):
        provider.embed(["words " * 4000])
    assert provider.embed(["words " * 300]).tokens == 450


def test_wrong_number_of_vectors_is_returned_unchanged(fake: FakeOllama, provider: OllamaProvider) -> None:
    """Return whether they are what was asked for is checked in one place, for all providers."""
    strike(fake, "embed_short")
    assert len(provider.embed(TEXTS).vectors) == 2
    strike(fake, "embed_dims")
    assert [len(vector) for vector in provider.embed(TEXTS).vectors] == [768, 768, 767]


@pytest.mark.parametrize("vector", ["text", [[1.0]], ["x"], 7, {"a": 1}], ids=str)
def test_what_is_no_vector(vector: Any) -> None:
    with scripted_server(answer({"embeddings": [vector]})) as server, closing(open_ollama(server.url)) as provider:
        assert checked_vectors(provider.embed(["a"]).vectors, 1, None).problems


def test_lone_surrogates_are_sent_as_question_marks(provider: OllamaProvider) -> None:
    (vector,) = provider.embed(["broken \ud83d emoji"]).vectors
    np.testing.assert_allclose(vector, fake_embedding("broken ? emoji", 768), atol=1e-6)


def test_proxies_of_the_environment_are_not_asked(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with closing(open_ollama(fake.url)) as provider:
        assert len(provider.embed(["a"]).vectors) == 1
