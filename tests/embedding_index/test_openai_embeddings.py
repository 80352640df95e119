"""The OpenAI provider against a server process that speaks, and fails, as OpenAI does."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest

from embedding_index.providers import openai_embeddings
from embedding_index.providers.contract import ModelIdentity, checked_vectors
from embedding_index.providers.openai_embeddings import OpenAIProvider
from error_handler import (
    ConfigurationError,
    IndexingError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    TriadError,
    UnusableVectorsError,
)
from tests.cases import mostly_thorough
from tests.embedding_index.embedding_site import open_openai
from tests.fakes.fake_openai import FakeOpenAI, expected_embedding
from tests.fakes.scripted_server import Handler, ScriptedServer, answer, drip, scripted_server

TEXTS = ["my red card", "Rückerstattung 💶", "orders: id integer"]
SECRET = "Ms Smith of 12 Hill Road"


@pytest.fixture
def provider(fake: FakeOpenAI) -> Iterator[OpenAIProvider]:
    opened = open_openai(fake.url)
    yield opened
    opened.close()


def test_vectors_come_in_the_order_of_the_texts(fake: FakeOpenAI, provider: OpenAIProvider) -> None:
    fake.configure(faults=[{"kind": "embed_unordered"}])
    got = provider.embed(TEXTS)
    for text, vector in zip(TEXTS, got.vectors, strict=True):
        np.testing.assert_allclose(vector, expected_embedding(text, 1536), atol=1e-6)
    assert got.tokens is not None
    assert got.tokens > 0
    assert provider.identity == ModelIdentity("openai", "text-embedding-3-small", None)


def test_shortened_vectors(fake: FakeOpenAI) -> None:
    provider = open_openai(fake.url, dimensions=64)
    assert [len(vector) for vector in provider.embed(TEXTS).vectors] == [64, 64, 64]
    assert provider.identity.dimensions == 64
    provider.close()


def test_the_whole_length_by_its_number_is_the_same_index(fake: FakeOpenAI) -> None:
    """Else EMBEDDING_DIMENSIONS=1536, set or left out later, would pay for everything again."""
    with closing(open_openai(fake.url, dimensions=1536)) as provider:
        assert provider.identity == ModelIdentity("openai", "text-embedding-3-small", None)
        assert len(provider.embed(["a"]).vectors[0]) == 1536


def test_models_that_cannot_be_shortened_are_refused_before_anything_is_sent(fake: FakeOpenAI) -> None:
    with pytest.raises(ConfigurationError, match="EMBEDDING_DIMENSIONS"):
        open_openai(fake.url, dimensions=64, embedding_model="text-embedding-ada-002")
    assert fake.stats()["requests"] == 0


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ({"kind": "insufficient_quota_429"}, ConfigurationError, "add credit"),
        ({"kind": "unauthorized_401"}, ConfigurationError, "OPENAI_API_KEY"),
        ({"kind": "forbidden_403"}, ConfigurationError, "EMBEDDING_MODEL"),
        ({"kind": "not_found_404"}, ConfigurationError, "EMBEDDING_MODEL"),
        (
            {"kind": "status", "status": 307, "headers": {"location": "/elsewhere"}},
            ConfigurationError,
            "OPENAI_BASE_URL",
        ),
        ({"kind": "bad_request_400"}, ProviderRejectedError, "400"),
        ({"kind": "status", "status": 413}, ProviderRejectedError, "413"),
        ({"kind": "server_error_500"}, ProviderUnavailableError, "500"),
        ({"kind": "overloaded_503"}, ProviderUnavailableError, "503"),
        ({"kind": "bad_gateway_502"}, ProviderUnavailableError, "502"),
        ({"kind": "close"}, ProviderUnavailableError, "network"),
        ({"kind": "reset"}, ProviderUnavailableError, "network"),
        ({"kind": "garbage"}, ProviderUnavailableError, "network"),
        ({"kind": "answer_lost"}, ProviderUnavailableError, "network"),
        ({"kind": "truncated"}, ProviderUnavailableError, "network"),
        ({"kind": "reset_after"}, ProviderUnavailableError, "network"),
        ({"kind": "cut"}, ProviderUnavailableError, "not JSON"),
        ({"kind": "not_json"}, ProviderUnavailableError, "not JSON"),
        ({"kind": "embed_short"}, UnusableVectorsError, "2 vectors"),
        ({"kind": "embed_extra"}, UnusableVectorsError, "4 vectors"),
        ({"kind": "embed_same_index"}, UnusableVectorsError, "1 numbers"),
    ],
    ids=lambda value: str(value.get("status", value["kind"])) if isinstance(value, dict) else "",
)
def test_each_fault_is_one_of_our_errors_and_one_request(
    fake: FakeOpenAI, provider: OpenAIProvider, fault: dict[str, Any], error: type[TriadError], words: str
) -> None:
    """Exactly that class, and no retry: a lost answer would be billed twice."""
    fake.configure(faults=[fault])
    with pytest.raises(error, match=words) as caught:
        provider.embed(TEXTS)
    assert type(caught.value) is error
    assert fake.stats()["requests"] == 1


@pytest.mark.parametrize(
    ("fields", "wait_s"),
    [({"retry_after": 7}, 7.0), ({"retry_after_ms": 250, "retry_after": 7}, 0.25), ({}, None)],
    ids=["seconds", "milliseconds", "none"],
)
def test_busy_says_how_long_to_wait(
    fake: FakeOpenAI, provider: OpenAIProvider, fields: dict[str, Any], wait_s: float | None
) -> None:
    fake.configure(faults=[{"kind": "rate_limit_429", **fields}])
    with pytest.raises(ProviderBusyError) as caught:
        provider.embed(TEXTS)
    assert caught.value.wait_s == wait_s


@pytest.mark.parametrize("kind", ["bad_request_400", "rate_limit_429", "server_error_500", "not_found_404"])
def test_errors_do_not_quote_what_the_server_quotes(fake: FakeOpenAI, provider: OpenAIProvider, kind: str) -> None:
    fake.configure(faults=[{"kind": kind, "message": f"cannot embed '{SECRET}'", "code": f"code {SECRET}"}])
    with pytest.raises(TriadError) as caught:
        provider.embed([SECRET])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "kind", mostly_thorough(["bad_request_400", "rate_limit_429", "server_error_500", "not_found_404"], 2)
)
def test_errors_have_the_reason_of_the_server(fake: FakeOpenAI, provider: OpenAIProvider, kind: str) -> None:
    fake.configure(faults=[{"kind": kind, "message": "input 3 has no tokens", "code": "c"}])
    with pytest.raises(TriadError, match="; the server says: input 3 has no tokens"):
        provider.embed(["Where is it?"])


def test_echo_of_the_request_and_of_the_key_is_not_shown() -> None:
    def echo(handler: Handler) -> None:
        request = handler.server_state.requests[-1]
        key = next(value for name, value in request.headers.items() if name.lower() == "authorization")
        text = f"{key} {request.body.decode().replace('{', '')}"
        answer({"detail": [{"msg": text}]}, 422)(handler)

    with (
        scripted_server(echo) as server,
        closing(open_openai(f"{server.url}/v1")) as provider,
        pytest.raises(ProviderRejectedError, match=r"the server says: Bearer \*\*\*") as caught,
    ):
        provider.embed(["Where is it?", "I am Xaver Quabeck"])
    assert "Where" not in str(caught.value)
    assert "Quabeck" not in str(caught.value)


def test_server_without_tls_is_called_that() -> None:
    with (
        scripted_server() as server,
        closing(open_openai(f"{server.url.replace('http', 'https')}/v1")) as provider,
        pytest.raises(ProviderUnavailableError, match=r"no TLS connection to https://127.0.0.1:\d+ .*OPENAI_BASE_URL"),
    ):
        provider.embed(TEXTS)


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "slow", "bytes_per_s": 100}], ids=["silence", "drips"])
def test_the_time_out_is_of_the_whole_call(fake: FakeOpenAI, fault: dict[str, Any]) -> None:
    """An answer that drips sends something all the time: no time-out of a single read ends it."""
    fake.configure(faults=[fault])
    provider = open_openai(fake.url, timeout_s=0.5)
    start = time.monotonic()
    with pytest.raises(ProviderUnavailableError, match="EMBEDDING_TIMEOUT_S"):
        provider.embed(TEXTS)
    assert time.monotonic() - start < 20, "the answer takes 80 s"
    provider.close()


@contextmanager
def answered(*bodies: Any) -> Iterator[tuple[ScriptedServer, OpenAIProvider]]:
    """A server that answers with each of *bodies*, in turn."""
    with (
        scripted_server(*(answer(body) for body in bodies)) as server,
        closing(open_openai(f"{server.url}/v1")) as provider,
    ):
        yield server, provider


def test_vectors_of_servers_that_know_no_base64() -> None:
    with answered({"data": [{"index": 1, "embedding": [0.5, -1]}, {"index": 0, "embedding": [1, 2]}]}) as (_, provider):
        got = provider.embed(["a", "b"])
    assert [np.asarray(vector).tolist() for vector in got.vectors] == [[1, 2], [0.5, -1]]
    assert got.tokens is None


@pytest.mark.parametrize("embedding", ["no base64!", "AAA=", "AAAA!AA==", [[1.0]], ["x"], None, 7], ids=str)
def test_what_is_no_vector(embedding: Any) -> None:
    """Bad base64 is found by the provider, other values by the check of all answers."""
    with answered({"data": [{"index": 0, "embedding": embedding}]}) as (_, provider):
        try:
            vectors = provider.embed(["a"]).vectors
        except UnusableVectorsError:
            assert isinstance(embedding, str)
        else:
            assert checked_vectors(vectors, 1, None).problems


def test_two_vectors_for_one_text() -> None:
    """No index is missing, and still nobody knows which one it is."""
    entry = {"index": 0, "embedding": [1.0]}
    with answered({"data": [entry, entry]}) as (_, provider), pytest.raises(UnusableVectorsError, match="2 vectors"):
        provider.embed(["a"])


@pytest.mark.parametrize("body", [[], {"data": None}, {"data": [7]}, {}], ids=str)
def test_answers_of_unknown_form_are_refused(body: Any) -> None:
    with answered(body) as (_, provider), pytest.raises(ProviderUnavailableError, match="OPENAI_BASE_URL"):
        provider.embed(["a"])


def test_numbers_that_are_none() -> None:
    with (
        answered(b'{"data": [{"index": 0, "embedding": [NaN, 1.0]}]}') as (_, provider),
        pytest.raises(UnusableVectorsError),
    ):
        provider.embed(["a"])


def test_nothing_of_the_environment_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai package reads these variables; this provider must not. A proxy would also be used for loopback."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-other")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-other")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Other: 1\nAuthorization: Bearer sk-other")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with answered({"data": [{"index": 0, "embedding": [1.0]}]}) as (server, provider):
        provider.embed(["a"])
    headers = {name.lower(): value for name, value in server.requests[-1].headers.items()}
    assert headers["authorization"] == "Bearer sk-test"
    assert not any("other" in value or name == "x-other" for name, value in headers.items())


def test_cookies_are_not_sent_back() -> None:
    good = {"data": [{"index": 0, "embedding": [1.0]}]}
    with (
        scripted_server(answer(good, Set_Cookie="who=you; Path=/"), answer(good)) as server,
        closing(open_openai(f"http://localhost:{server.port}/v1")) as provider,
    ):
        provider.embed(["a"])
        provider.embed(["b"])
    assert "cookie" not in {name.lower() for name in server.requests[-1].headers}


@pytest.mark.parametrize("url", ["http://a..b/v1", f"http://{'a' * 64}.invalid/v1"])
def test_malformed_address_is_refused(url: str) -> None:
    with closing(open_openai(url)) as provider, pytest.raises(ProviderUnavailableError, match="OPENAI_BASE_URL"):
        provider.embed(["a"])


def test_a_long_header_does_not_cost_the_answer() -> None:
    good = {"data": [{"index": 0, "embedding": [1.0]}]}
    with (
        scripted_server(answer(good, X_Policy="a" * 30_000)) as server,
        closing(open_openai(f"{server.url}/v1")) as provider,
    ):
        assert len(provider.embed(["a"]).vectors) == 1


def test_connection_is_closed_after_a_too_large_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed, because the server would send the rest of the answer."""
    monkeypatch.setattr(openai_embeddings, "MAX_ANSWER_BYTES", 10)
    with scripted_server(drip(0.05)) as server, closing(open_openai(f"{server.url}/v1")) as provider:
        with pytest.raises(ProviderUnavailableError, match="larger than 10 bytes"):
            provider.embed(["a"])
        assert server.client_left.wait(10)
        assert not server.dripped_to_the_end


def test_it_says_when_a_good_answer_begins(provider: OpenAIProvider, fake: FakeOpenAI) -> None:
    """While its body is on its way; a refusal may be about to close the gate for the next call."""
    begun: list[str] = []
    provider.embed(TEXTS, lambda: begun.append("good"))
    fake.configure(faults=[{"kind": "rate_limit_429", "when": {"route": "embeddings.create"}}])
    with pytest.raises(ProviderBusyError):
        provider.embed(TEXTS, lambda: begun.append("busy"))
    assert begun == ["good"]


def test_lone_surrogates_are_sent_as_question_marks(fake: FakeOpenAI, provider: OpenAIProvider) -> None:
    (vector,) = provider.embed(["broken \ud83d emoji"]).vectors
    np.testing.assert_allclose(vector, expected_embedding("broken ? emoji", 1536), atol=1e-6)


def test_calls_run_at_once(fake: FakeOpenAI) -> None:
    """As many as EMBEDDING_CONCURRENCY says, from as many threads."""
    provider = open_openai(fake.url, max_concurrent=3)
    assert provider.max_concurrent == 3
    fake.configure(latency_s=0.3)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: provider.embed([text]), TEXTS))
    assert fake.stats()["max_sync_in_flight"] == 3
    for text, got in zip(TEXTS, answers, strict=True):
        np.testing.assert_allclose(got.vectors[0], expected_embedding(text, 1536), atol=1e-6)
    provider.close()


def test_close_ends_a_call_in_flight_and_the_thread(fake: FakeOpenAI) -> None:
    fake.configure(faults=[{"kind": "hang"}])
    provider = open_openai(fake.url)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(provider.embed, ["a"])
        fake.wait_for("in_flight", 1)
        provider.close()
        with pytest.raises(ProviderUnavailableError, match="closed"):
            call.result(10)
    provider.close()
    assert "openai-embeddings" not in {thread.name for thread in threading.enumerate()}


def test_a_key_is_needed_wherever_the_server_is(fake: FakeOpenAI) -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        open_openai(fake.url, {"api_key": None})


def test_no_error_shows_the_key(fake: FakeOpenAI) -> None:
    fake.configure(faults=[{"kind": "unauthorized_401"}])
    provider = open_openai(fake.url, {"api_key": "sk-very-secret"})
    with pytest.raises(ConfigurationError) as caught:
        provider.embed(["a"])
    assert "very-secret" not in "".join(traceback.format_exception(caught.value))
    provider.close()


@pytest.mark.parametrize(
    ("url", "leaves"),
    [
        ("http://127.0.0.1:8000/v1", False),
        ("http://localhost/v1", False),
        ("http://[::1]:1/v1", False),
        ("https://api.openai.com/v1", True),
        ("http://192.168.1.5/v1", True),
        ("http://localhost.example.com/v1", True),
    ],
)
def test_servers_on_other_machines_are_external(url: str, leaves: bool) -> None:
    provider = open_openai(url)
    assert provider.is_external is leaves
    provider.close()


def test_the_limits_of_openai(fake: FakeOpenAI, provider: OpenAIProvider) -> None:
    """The fake's limits are OpenAI's: what is just within passes, one more is refused."""
    limits = provider.limits
    assert len(provider.embed(["x"] * limits.inputs).vectors) == limits.inputs
    with pytest.raises(ProviderRejectedError):
        provider.embed(["x"] * (limits.inputs + 1))
    assert (limits.input_tokens, limits.request_tokens) == (8192, 300_000)


def test_errors_of_the_provider_are_indexing_errors() -> None:
    assert issubclass(ProviderBusyError, IndexingError)
