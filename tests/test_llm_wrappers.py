"""Both wrappers, against a real HTTP server: one suite, because they must not differ."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import async_llm_wrapper
import llm_wrapper
from aggregator import aggregate_conversation
from classifier import Classifier
from config import Settings, load_settings, load_taxonomy
from domain.conversation import Classification, Outcome
from error_handler import (
    ConfigurationError,
    LLMConnectionError,
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    LLMRejectedError,
    LLMReplyError,
    LLMTimeoutError,
    LLMUnavailableError,
    Reason,
)
from model_server.breaker import BreakerPolicy, CircuitBreaker
from model_server.models import chat_target
from model_server.protocol import SEED, ChatReply, ChatTarget, ServerRequest
from tests.cases import mostly_thorough
from tests.fakes.scripted_server import (
    GOOD_CONTENT,
    Handler,
    ScriptedServer,
    Step,
    answer,
    chat_reply,
    chunked,
    drip,
    drip_header,
    hang,
    reset,
    say,
    scripted_server,
)

MESSAGES = [{"role": "system", "content": "Label it."}, {"role": "user", "content": "Customer: where is it?"}]
SCHEMA = b"{}"
TAXONOMY = load_taxonomy()
CLASSIFIER = Classifier(TAXONOMY)
CONVERSATION = aggregate_conversation({"text": "where is it?"})
BUSY, DOWN = answer({"error": "server busy"}, 503), answer({"error": "model runner has unexpectedly stopped"}, 500)
QUICK = BreakerPolicy(first_probe_s=0.01, probe_cap_s=0.02, outage_limit_s=0.1)


def settings_for(url: str, **given: Any) -> Settings:
    return load_settings(None, **{"ollama_endpoint": url, "ollama_model": "llama3.2", "llm_backoff_s": 0, **given})


class Sync:
    """Asks through llm_wrapper."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def _ask(self, question: Callable[[llm_wrapper.LLMClient], Any]) -> Any:
        with llm_wrapper.open_session() as session:
            return question(llm_wrapper.LLMClient(self._settings, chat_target(self._settings, "llama3.2"), session))

    def chat(self, times: int = 1) -> ChatReply:
        return self._ask(lambda client: [client.chat(MESSAGES, SCHEMA) for _ in range(times)][-1])  # type: ignore[no-any-return]

    def prepare(self) -> ChatTarget:
        return self._ask(lambda client: client.prepare(self._settings))  # type: ignore[no-any-return]

    def classify(self, rounds: int = 0) -> Outcome:
        return self._ask(lambda client: llm_wrapper.ollama_classify(CONVERSATION, client, CLASSIFIER, rounds))  # type: ignore[no-any-return]


class Async:
    """Asks through async_llm_wrapper, with a breaker that gives up soon."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def _ask(self, question: Callable[[async_llm_wrapper.AsyncLLMClient], Any]) -> Any:
        async def run() -> Any:
            async with async_llm_wrapper.open_session(2) as session:
                client = async_client(self._settings, session)
                try:
                    return await question(client)
                finally:
                    await client.breaker.close()

        return asyncio.run(run())

    def chat(self, times: int = 1) -> ChatReply:
        async def one_after_another(client: async_llm_wrapper.AsyncLLMClient) -> ChatReply:
            return [await client.chat(MESSAGES, SCHEMA) for _ in range(times)][-1]

        return self._ask(one_after_another)  # type: ignore[no-any-return]

    def prepare(self) -> ChatTarget:
        return self._ask(lambda client: client.prepare(self._settings))  # type: ignore[no-any-return]

    def classify(self, rounds: int = 0) -> Outcome:
        return self._ask(  # type: ignore[no-any-return]
            lambda client: async_llm_wrapper.ollama_classify_async(CONVERSATION, client, CLASSIFIER, rounds)
        )


def async_client(settings: Settings, session: Any) -> async_llm_wrapper.AsyncLLMClient:
    client = async_llm_wrapper.AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
    client.breaker = CircuitBreaker(client.is_alive, QUICK)
    return client


Asker = Sync | Async


@pytest.fixture(params=[Sync, Async], ids=["sync", "async"])
def wrapper(request: pytest.FixtureRequest) -> type[Asker]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def collected() -> Iterator[None]:
    """Let go of what broken connections leave behind while this test's filter of warnings still holds.

    When a connection is reset, http.client leaves closing the socket to the garbage collector.
    """
    yield
    gc.collect()
    gc.freeze()  # or the next one looks through all that was imported


def test_complete_answer_is_returned(wrapper: type[Asker], server: ScriptedServer) -> None:
    """One POST with everything that model_server.protocol builds."""
    assert wrapper(settings_for(server.url)).chat() == ChatReply(GOOD_CONTENT, 1500, 40)
    (request,) = server.chats
    assert (request.method, request.path) == ("POST", "/api/chat")
    assert request.json["messages"] == MESSAGES
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Accept-Encoding"] == "identity"
    assert "Authorization" not in request.headers


def test_calls_share_a_connection(wrapper: type[Asker], server: ScriptedServer) -> None:
    """A closed one is opened again, without a failure; a body may come in pieces."""
    server.script.extend([answer(), answer(Connection="close"), chunked(0), answer()])
    assert wrapper(settings_for(server.url, llm_max_attempts=1)).chat(times=4).text == GOOD_CONTENT


def test_busy_server_is_retried(wrapper: type[Asker], server: ScriptedServer) -> None:
    """503, then 429, then an answer: three requests with the same body."""
    server.script.extend([BUSY, answer({"error": "slow down"}, 429), answer()])
    assert wrapper(settings_for(server.url)).chat().text == GOOD_CONTENT
    assert len({request.body for request in server.chats}) == 1
    assert len(server.chats) == 3


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize(
    "step",
    mostly_thorough(
        [
            pytest.param(DOWN, id="500"),
            pytest.param(answer(b"<html>Bad gateway</html>", 502), id="502-html"),
            pytest.param(answer(b"<html>Sign in</html>", Content_Type="text/html"), id="200-html"),
            pytest.param(answer(json.dumps(chat_reply()).encode()[:60]), id="half-json"),
            pytest.param(answer([]), id="list"),
            pytest.param(answer(b""), id="nothing"),
            pytest.param(answer({"error": "unexpected EOF"}), id="200-error"),
            pytest.param(answer(gzip.compress(json.dumps(chat_reply()).encode()), Content_Encoding="gzip"), id="gzip"),
            pytest.param(answer(json.dumps(chat_reply()).encode() + b" " * 10_000_000), id="10-MB"),
            pytest.param(chunked(10_000_000), id="10-MB-chunked"),
            pytest.param(
                answer(json.dumps(chat_reply()).encode(), Content_Length="100000", Connection="close"), id="short-body"
            ),
            pytest.param(reset, id="reset"),
            pytest.param(say(b"220 mail.example ESMTP\r\n"), id="not-http"),
            pytest.param(say(b""), id="closed"),
        ],
        4,
    ),
)
def test_transient_errors_are_retried_up_to_the_limit(wrapper: type[Asker], server: ScriptedServer, step: Step) -> None:
    """Then the last error is raised as it was; nothing of it counts as an answer."""
    server.script.extend([step] * 3)
    with pytest.raises(LLMUnavailableError):
        wrapper(settings_for(server.url, llm_timeout_s=5)).chat()
    assert len(server.chats) == 3


@pytest.mark.parametrize(
    ("step", "error"),
    [
        pytest.param(answer({"error": "model 'x' not found"}, 404), LLMModelError, id="404"),
        pytest.param(answer({"error": "the input length exceeds the context length"}, 400), LLMContextError, id="400"),
        pytest.param(answer(chat_reply(done=False)), LLMReplyError, id="done-false"),
        pytest.param(answer(chat_reply(message=None)), LLMReplyError, id="message-null"),
        pytest.param(answer(chat_reply(prompt_eval_count=8192)), LLMReplyError, id="cut-prompt"),
        pytest.param(answer(b"", 302, Location="/v1/chat/completions"), LLMModelError, id="redirect"),
        pytest.param(answer(b"", 307, Location="/api/generate"), LLMModelError, id="redirect-of-a-post"),
    ],
)
def test_permanent_errors_are_not_retried(
    wrapper: type[Asker], server: ScriptedServer, step: Step, error: type[LLMError]
) -> None:
    """Another attempt would get the same, and a redirect is not followed."""
    server.script.append(step)
    with pytest.raises(error):
        wrapper(settings_for(server.url)).chat()
    assert len(server.chats) == 1


@pytest.mark.parametrize("step", [hang, drip(0.05)], ids=["silent", "dripping"])
def test_timeout_limits_the_whole_call(wrapper: type[Asker], server: ScriptedServer, step: Step) -> None:
    """A byte now and then does not prolong it, and the connection is given up."""
    server.script.append(step)
    with pytest.raises(LLMTimeoutError):
        wrapper(settings_for(server.url, llm_timeout_s=0.3, llm_max_attempts=1)).chat()
    assert server.client_left.wait(30)
    assert not server.dripped_to_the_end


def test_dripping_header_times_out(wrapper: type[Asker], server: ScriptedServer) -> None:
    server.script.append(drip_header(0.05, 100))
    with pytest.raises(LLMTimeoutError):
        wrapper(settings_for(server.url, llm_timeout_s=0.3, llm_max_attempts=1)).chat()
    assert server.client_left.wait(30)
    assert not server.dripped_to_the_end


def test_single_bytes_do_not_restart_the_timeout(server: ScriptedServer) -> None:
    """It comes late, and then none: the synchronous client waits for what is left, not for a whole time-out more."""
    left: list[bool] = []

    def late(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        left.append(handler.client_leaves_within(2.4))
        handler.wfile.write(b" ")
        left.append(handler.client_leaves_within(2.4))

    server.script.append(late)
    with pytest.raises(LLMTimeoutError):
        Sync(settings_for(server.url, llm_timeout_s=3.0, llm_max_attempts=1)).chat()
    assert server.client_left.wait(30)
    assert left == [False, True]


def test_sending_counts_towards_the_timeout() -> None:
    """A server takes the request after four fifths of the time, and says nothing: only the rest is waited for."""
    left: list[bool] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            assert not threading.Event().wait(2.4)
            connection.settimeout(2.4)
            try:
                while connection.recv(1 << 20):
                    pass
                left.append(True)
            except TimeoutError:
                left.append(False)

    with socket.create_server(("127.0.0.1", 0)) as listener, llm_wrapper.open_session() as session:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        request = ServerRequest("POST", f"http://127.0.0.1:{listener.getsockname()[1]}/", bytes(40_000_000), 3.0)
        with pytest.raises(LLMTimeoutError):
            llm_wrapper.exchange(session, request, {})
        thread.join()
    assert left == [True]


def test_silence_within_an_answer_times_out(wrapper: type[Asker], server: ScriptedServer) -> None:
    """Not a lost connection, which would open the breaker."""

    def stall(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        hang(handler)

    server.script.append(stall)
    with pytest.raises(LLMTimeoutError):
        wrapper(settings_for(server.url, llm_timeout_s=0.3, llm_max_attempts=1)).chat()


def test_refused_connection_is_a_connection_error(wrapper: type[Asker], server: ScriptedServer) -> None:
    """The synchronous wrapper raises after its attempts, the asynchronous one after the outage limit."""
    server.stop()
    with pytest.raises((LLMConnectionError, LLMOutageError)) as caught:
        wrapper(settings_for(server.url)).chat()
    assert isinstance(caught.value, LLMOutageError) == (wrapper is Async)
    assert f"no connection to the model server at {server.url}; start it (ollama serve) or correct" in str(caught.value)


def test_connect_timeout_is_a_connection_error(wrapper: type[Asker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is switched off refuses nothing; that must count for the breaker all the same."""
    for module in (llm_wrapper, async_llm_wrapper):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(async_llm_wrapper, "PROBE_TIMEOUT_S", 0.05)
    # With its queue full, the kernel answers further calls with nothing at all.
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as deaf,
        socket.create_connection(deaf.getsockname()),
        pytest.raises((LLMConnectionError, LLMOutageError)),
    ):
        wrapper(settings_for(f"http://127.0.0.1:{deaf.getsockname()[1]}")).chat()


@pytest.mark.parametrize("step", [reset, say(b""), say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")])
def test_lost_connection_does_not_say_start_it(wrapper: type[Asker], server: ScriptedServer, step: Step) -> None:
    """The server is there, so its log says why."""
    server.script.append(step)
    with pytest.raises(
        LLMConnectionError, match="closed the connection before its answer was complete; its log"
    ) as caught:
        wrapper(settings_for(server.url, llm_max_attempts=1)).chat()
    assert "start it" not in str(caught.value)


def test_name_that_cannot_be_resolved_is_called_that(wrapper: type[Asker], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a typing error in the address looks; the resolver is not asked."""

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(
        LLMConnectionError, match=r"no-such-host:1 cannot be resolved \(DNS\); correct OLLAMA_END"
    ) as caught:
        wrapper(settings_for("http://no-such-host:1")).prepare()
    assert "start it" not in str(caught.value)


def test_server_without_tls_is_called_that(wrapper: type[Asker], server: ScriptedServer) -> None:
    url = server.url.replace("http:", "https:")
    with pytest.raises(LLMConnectionError, match=r"no TLS connection to https:.*correct LLM_API_URL") as caught:
        wrapper(settings_for("http://127.0.0.1:1", llm_api_url=f"{url}/v1/chat/completions", llm_model="m")).prepare()
    assert "start it" not in str(caught.value)


def test_certificate_that_is_not_trusted_is_called_that(wrapper: type[Asker], certificate: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with scripted_server(tls=context) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(
            LLMConnectionError, match=r"certificate of .* is not trusted \(self.signed.*SSL_CERT_FILE"
        ) as caught:
            wrapper(settings_for(url)).prepare()
    assert "start it" not in str(caught.value)


def test_page_of_a_proxy_is_named(wrapper: type[Asker], server: ScriptedServer) -> None:
    page = answer(b"<html><head><title>502 Bad Gateway</title></head></html>", 502, Content_Type="text/html")
    server.script.extend([page, page])
    with pytest.raises(LLMUnavailableError, match=r"failed \(HTTP 502\); the server says: a web page, 502 Bad Gateway"):
        wrapper(settings_for(server.url, llm_max_attempts=2)).chat()
    server.models = page
    with pytest.raises(
        LLMUnavailableError, match=r"list its models \(HTTP 502\); the server says: a web page, 502 Bad"
    ):
        wrapper(settings_for(server.url)).prepare()


def test_reason_is_in_the_log_of_each_attempt(
    wrapper: type[Asker], server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script.append(answer({"error": "no slot, model m is loading"}, 503))
    wrapper(settings_for(server.url, llm_max_attempts=2)).chat()
    (line,) = [record for record in caplog.records if "attempt 1 failed" in record.getMessage()]
    assert line.levelname == "WARNING"
    assert "the server says: no slot, model m is loading" in line.getMessage()


def echo(handler: Handler) -> None:
    """Refuse the request with all of its body, as a reason."""
    answer({"error": handler.server_state.requests[-1].body.decode().replace("{", "")}, 400)(handler)


def test_echo_of_the_prompt_is_not_shown(wrapper: type[Asker], server: ScriptedServer) -> None:
    """Of what each protocol sends."""
    for settings in (
        settings_for(server.url),
        settings_for("http://127.0.0.1:1", llm_api_url=f"{server.url}/api/generate", llm_model="m"),
        settings_for("http://127.0.0.1:1", llm_api_url=f"{server.url}/v1/chat/completions", llm_model="m"),
    ):
        server.script.append(echo)
        server.script.append(answer({"error": "bad turn 'Customer: where is it?'"}, 400))
        for _ in range(2):
            with pytest.raises(LLMRejectedError) as caught:
                wrapper(settings).chat()
            assert "where is it" not in str(caught.value)


def test_proxies_of_the_environment_are_ignored(
    wrapper: type[Asker], server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither its proxies nor its passwords: customer text goes where the settings say."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    (tmp_path / "netrc").write_text("default login customer password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wrapper(settings_for(server.url)).chat().text == GOOD_CONTENT
    assert "Authorization" not in server.chats[0].headers


@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions"])
def test_llm_api_url_is_used(wrapper: type[Asker], server: ScriptedServer, path: str) -> None:
    """Its path decides the protocol, and the key goes along."""
    choice = {"message": {"content": GOOD_CONTENT}, "finish_reason": "stop"}
    server.script.append(answer({"response": GOOD_CONTENT, "done": True, "choices": [choice]}))
    settings = settings_for(server.url, llm_api_url=server.url + path, llm_model="llama3.2", llm_api_key="sk-1")
    assert wrapper(settings).chat().text == GOOD_CONTENT
    assert server.chats[0].path == path
    assert server.chats[0].headers["Authorization"] == "Bearer sk-1"


def test_prepare(wrapper: type[Asker], server: ScriptedServer) -> None:
    """The server is asked for its models and for what the chosen one can."""
    server.show = answer({"capabilities": ["completion", "thinking"]})
    target = wrapper(settings_for(server.url, ollama_model="qwen3:8b")).prepare()
    assert (target.digest, target.disable_thinking) == ("sha256:2", True)
    assert [(request.method, request.path) for request in server.requests] == [
        ("GET", "/api/tags"),
        ("POST", "/api/show"),
    ]
    assert server.requests[1].json == {"model": "qwen3:8b"}


def test_prepare_with_a_missing_model_lists_the_models(wrapper: type[Asker], server: ScriptedServer) -> None:
    """The message lists what is there; nothing is asked of a model."""
    with pytest.raises(ConfigurationError, match=r"llama3\.2:latest, qwen3:8b"):
        wrapper(settings_for(server.url, ollama_model="missing")).prepare()
    assert not server.chats


def test_prepare_without_a_server_is_an_error(wrapper: type[Asker], server: ScriptedServer) -> None:
    """At once: nobody waits for a server at the start of a run."""
    server.stop()
    with pytest.raises(LLMUnavailableError):
        wrapper(settings_for(server.url)).prepare()


def test_classify(wrapper: type[Asker], server: ScriptedServer) -> None:
    """A conversation becomes labels with how they were made."""
    outcome = wrapper(settings_for(server.url)).classify()
    assert outcome.classification == Classification(
        categorization="Parcel is late.", intent="Order Status", topic="Shipping/Delivery", sentiment="Negative"
    )
    assert (outcome.attempts, outcome.model_used, outcome.prompt_tokens) == (1, "llama3.2", 1500)
    sent = server.chats[0].json
    assert sent["messages"] == CLASSIFIER.messages(CONVERSATION.transcript)
    assert sent["format"] == json.loads(CLASSIFIER.schema_json)


def test_classify_repairs_once(wrapper: type[Asker], server: ScriptedServer) -> None:
    """The second question has another seed and says what was wrong."""
    server.script.append(answer(chat_reply(GOOD_CONTENT.replace("Order Status", "Praise"))))
    outcome = wrapper(settings_for(server.url)).classify()
    assert outcome.attempts == 2
    first, second = (request.json for request in server.chats)
    assert "not a label" in second["messages"][-1]["content"]
    assert (first["options"]["seed"], second["options"]["seed"]) == (SEED, SEED + 1)


def test_classify_repeats_a_cut_off_answer(wrapper: type[Asker], server: ScriptedServer) -> None:
    """The client's own refusal of a reply goes through the same repair."""
    server.script.append(answer(chat_reply("{", done_reason="length")))
    assert wrapper(settings_for(server.url)).classify().attempts == 2
    assert server.chats[0].json["messages"] == server.chats[1].json["messages"]


def test_classify_fails_after_one_repair(wrapper: type[Asker], server: ScriptedServer) -> None:
    """With the reason of the last answer."""
    server.script.extend([answer(chat_reply("no JSON")), answer(chat_reply("{}"))])
    with pytest.raises(LLMReplyError) as caught:
        wrapper(settings_for(server.url)).classify()
    assert caught.value.reason is Reason.WRONG_SHAPE
    assert len(server.chats) == 2


def test_classify_does_not_repair_a_cut_prompt(wrapper: type[Asker], server: ScriptedServer) -> None:
    """It would be cut again."""
    server.script.append(answer(chat_reply(prompt_eval_count=8192)))
    with pytest.raises(LLMReplyError) as caught:
        wrapper(settings_for(server.url)).classify()
    assert caught.value.reason is Reason.CONTEXT_OVERFLOW
    assert len(server.chats) == 1


def test_each_attempt_has_its_own_seeds(wrapper: type[Asker], server: ScriptedServer) -> None:
    """A document of the retry queue gets another chance, not the same one."""
    server.script.append(answer(chat_reply("no JSON")))
    wrapper(settings_for(server.url)).classify(rounds=2)
    assert [request.json["options"]["seed"] for request in server.chats] == [SEED + 4, SEED + 5]
