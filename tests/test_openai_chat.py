"""Servers with OpenAI's protocol: what both wrappers learn about one, and remember."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import llm_wrapper
from aggregator import aggregate_conversation
from classifier import Classifier
from config import load_settings, load_taxonomy
from domain.conversation import Conversation
from error_handler import (
    LLMContextError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    Reason,
    SkippedDocumentError,
)
from model_server.models import chat_target
from model_server.window import OnLong, choose_window
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.scripted_server import GOOD_CONTENT, Handler, ScriptedServer, Step, answer, scripted_server
from tests.test_llm_wrappers import Async, Sync

THINKING = {"enable_thinking": False, "thinking": False}
Chat = Callable[[dict[str, Any]], tuple[int, Any]]


def ok(content: Any = GOOD_CONTENT, finish: str | None = "stop", **message: Any) -> tuple[int, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 1500, "completion_tokens": 40}}


def refused(text: str, status: int = 400) -> tuple[int, Any]:
    return status, {"object": "error", "message": text, "code": status}


def each(chat: Chat) -> Step:
    """Answer each request as *chat* says."""

    def step(handler: Handler) -> None:
        status, fields = chat(handler.server_state.requests[-1].json)
        answer(fields, status)(handler)

    return step


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        running.models = answer({"data": [{"id": "llama3.2"}]})
        yield running


@pytest.fixture(params=[Sync, Async])
def asker(request: pytest.FixtureRequest, server: ScriptedServer) -> Sync | Async:
    settings = load_settings(
        None, llm_api_url=f"{server.url}/v1/chat/completions", llm_model="llama3.2", llm_backoff_s=0, llm_max_attempts=2
    )
    return request.param(settings)  # type: ignore[no-any-return]


def without_system_role(body: dict[str, Any]) -> tuple[int, Any]:
    roles = [message["role"] for message in body["messages"]]
    return refused("System role not supported") if "system" in roles else ok()


@pytest.mark.parametrize("status", [400, 500, 200])
def test_rules_move_into_the_user_turn_once(asker: Sync | Async, server: ScriptedServer, status: int) -> None:
    """A model without a system role costs one refused request for the whole run, whatever the status of the refusal."""

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        code, fields = without_system_role(body)
        return (code if code == 200 else status), fields

    server.script.extend([each(chat)] * 3)
    assert asker.chat(times=2).text == GOOD_CONTENT
    first, second, third = (request.json["messages"] for request in server.chats)
    assert first[0]["role"] == "system"
    assert second == third == [{"role": "user", "content": "Label it.\n\nCustomer: where is it?"}]


def test_thinking_is_switched_off_once_it_is_seen(asker: Sync | Async, server: ScriptedServer) -> None:
    """A model that ends inside its thoughts is asked again with the switches, and so are all later requests."""

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        return ok() if "chat_template_kwargs" in body else ok("<think>hm hm", "length")

    server.script.extend([each(chat)] * 3)
    assert asker.chat(times=2).text == GOOD_CONTENT
    first, *others = (request.json for request in server.chats)
    assert "reasoning_effort" not in first
    assert [(body["chat_template_kwargs"], body["reasoning_effort"]) for body in others] == [(THINKING, "none")] * 2


@pytest.mark.parametrize(
    ("known", "sent"),
    [
        ({"reasoning_effort": ("low", "medium", "high")}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": ("none", "low")}, {"reasoning_effort": "none"}),
        ({"chat_template_kwargs": (THINKING,)}, {"chat_template_kwargs": THINKING}),
        ({}, {}),
    ],
)
def test_switches_that_a_server_refuses_are_dropped(
    asker: Sync | Async, server: ScriptedServer, known: dict[str, Any], sent: dict[str, Any]
) -> None:
    """One by one, and for the rest of the run; an answer beside thoughts is used all the same."""

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        for name in ("chat_template_kwargs", "reasoning_effort"):
            if name in body and body[name] not in known.get(name, ()):
                return refused(f"Unrecognized request argument or value: {name}", 422)
        return ok(reasoning_content="The customer asks ...")

    server.script.extend([each(chat)] * 8)
    assert asker.chat(times=3).text == GOOD_CONTENT
    body = server.chats[-1].json
    assert {name: body[name] for name in ("chat_template_kwargs", "reasoning_effort") if name in body} == sent


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": GOOD_CONTENT},
        {"content": "", "reasoning": f"\n{GOOD_CONTENT}\n"},
        {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": GOOD_CONTENT}]},
    ],
)
def test_answer_in_another_field_is_used(asker: Sync | Async, server: ScriptedServer, message: dict[str, Any]) -> None:
    """Servers file the whole answer as reasoning, or send it in parts."""
    server.script.extend([each(lambda _body: ok(**message))] * 2)
    assert json.loads(asker.chat().text) == json.loads(GOOD_CONTENT)


def test_draft_inside_thoughts_is_no_answer(asker: Sync | Async, server: ScriptedServer) -> None:
    """Only a field that is one JSON object from its beginning to its end is an answer."""
    server.script.extend([each(lambda _body: ok("", reasoning_content=f"Perhaps {GOOD_CONTENT}, or not."))] * 2)
    with pytest.raises(LLMReplyError) as caught:
        asker.chat()
    assert caught.value.reason is Reason.EMPTY


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"error": {"message": "maximum context length is 4096 tokens, got 9000"}}, LLMContextError),
        ({"error": {"message": "slow down", "code": 500}}, LLMUnavailableError),
        ({"choices": [{"error": {"message": "context length of 4096 tokens exceeded by 9000"}}]}, LLMContextError),
        ({"object": "error", "message": "Internal", "code": 502}, LLMUnavailableError),
        ({"error": "unexpected EOF", "choices": []}, LLMUnavailableError),
    ],
)
def test_error_inside_a_200_counts_as_that_error(
    asker: Sync | Async, server: ScriptedServer, fields: dict[str, Any], error: type[Exception]
) -> None:
    """Proxies and local servers answer 200 and put the error into the body, or into the choice."""
    server.script.extend([answer(fields)] * 2)
    with pytest.raises(error) as caught:
        asker.chat()
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "models",
    [
        answer({"detail": "Not Found"}, 404),
        answer({"data": []}),
        answer([{"id": "other"}]),
        answer(b"<html>", 405),
        answer({"object": "list", "data": None}),
    ],
)
def test_named_model_is_tried_without_a_list(asker: Sync | Async, server: ScriptedServer, models: Step) -> None:
    """A proxy need not list its models; the first answer shows whether the name is right."""
    server.models = models
    assert asker.prepare().model == "llama3.2"


def test_server_that_fails_is_not_taken_for_one_without_a_list(asker: Sync | Async, server: ScriptedServer) -> None:
    """It may be starting."""
    server.models = answer({"error": "loading"}, 503)
    with pytest.raises(LLMUnavailableError):
        asker.prepare()


def long_conversation(turns: int) -> Conversation:
    text = "my parcel number {} is late and nobody answers, please help me with it"
    messages = [{"sender": "customer", "text": text.format(number)} for number in range(turns)]
    return aggregate_conversation({"messages": messages})


def test_ollama_behind_v1_is_recognised_and_its_cuts_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    """The server uses half of its window without an error; the conversation is truncated to that window, and marked."""
    with FakeOllama(default_num_ctx=4096) as fake:
        settings = load_settings(None, llm_api_url=f"{fake.url}/v1/chat/completions", llm_model="llama3.2:latest")
        classifier = Classifier(load_taxonomy())
        with llm_wrapper.open_session() as session:
            client = llm_wrapper.LLMClient(settings, chat_target(settings, "llama3.2:latest"), session)
            client.prepare(settings)
            client.warm_up(choose_window([], None), print)
            assert "set OLLAMA_ENDPOINT" in caplog.text
            outcome = llm_wrapper.ollama_classify(long_conversation(600), client, classifier)
    assert not outcome.input_complete
    assert outcome.turns_used is not None
    assert 20 < outcome.turns_used < 600
    assert outcome.prompt_tokens is not None
    assert 2050 < outcome.prompt_tokens <= 4096 - 700


def reasoning_model(body: dict[str, Any]) -> tuple[int, Any]:
    """OpenAI's sentences about a reasoning model."""
    if "max_tokens" in body:
        text = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return 400, {"error": {"message": text, "type": "invalid_request_error", "param": "max_tokens"}}
    if "temperature" in body:
        text = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
        return 400, {"error": {"message": text, "type": "invalid_request_error", "param": "temperature"}}
    return ok()


def test_reasoning_model_behind_any_name_is_learned_once(asker: Sync | Async, server: ScriptedServer) -> None:
    """The limit has another name and room for the reasoning, and no temperature is sent, for the rest of the run."""
    server.script.extend([each(reasoning_model)] * 4)
    assert asker.chat(times=2).text == GOOD_CONTENT
    bodies = [request.json for request in server.chats]
    assert [set(body) & {"max_tokens", "max_completion_tokens", "temperature"} for body in bodies] == [
        {"max_tokens", "temperature"},
        {"max_completion_tokens", "temperature"},
        {"max_completion_tokens"},
        {"max_completion_tokens"},
    ]
    assert bodies[-1]["max_completion_tokens"] > bodies[0]["max_tokens"]


@pytest.mark.parametrize("text", ["max_tokens must be at most 500", "temperature 0 is cold, says the customer"])
def test_other_refusals_do_not_change_the_options(asker: Sync | Async, server: ScriptedServer, text: str) -> None:
    server.script.append(answer({"error": {"message": text}}, 400))
    with pytest.raises(LLMRejectedError):
        asker.chat()
    assert len(server.chats) == 1


@pytest.mark.parametrize("on_long", mostly_thorough(["fit", "skip", "fail"], 3))
@pytest.mark.parametrize("window", mostly_thorough([5000, 10_000, 1000], 2))
def test_server_that_names_no_size_is_tried_with_smaller_prompts(
    server: ScriptedServer, on_long: OnLong, window: int
) -> None:
    """It counts no tokens either. Each usual window is tried once, the largest first; the run remembers which one helped."""

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        characters = sum(len(message["content"]) for message in body["messages"])
        if characters / 4 + body["max_tokens"] > window:
            return refused("the input is longer than the context window")
        status, fields = ok()
        del fields["usage"]
        return status, fields

    server.script.extend([each(chat)] * 20)
    settings = load_settings(None, llm_api_url=f"{server.url}/v1/chat/completions", llm_model="llama3.2")
    classifier = Classifier(load_taxonomy(), on_long)
    with llm_wrapper.open_session() as session:
        client = llm_wrapper.LLMClient(settings, chat_target(settings, "llama3.2"), session)
        if on_long == "fit" and window > 1000:
            outcomes = [llm_wrapper.ollama_classify(long_conversation(1500), client, classifier) for _ in range(2)]
            assert [outcome.input_complete for outcome in outcomes] == [False, False]
            assert [outcome.attempts for outcome in outcomes] == [{5000: 5, 10_000: 4}[window], 2]
        else:
            with pytest.raises(SkippedDocumentError if on_long == "skip" else LLMContextError) as caught:
                llm_wrapper.ollama_classify(long_conversation(1500), client, classifier)
            assert caught.value.reason is Reason.CONTEXT_OVERFLOW
            assert len(server.chats) == (5 if on_long == "fit" else 1)


def test_other_server_is_not_taken_for_an_ollama(
    asker: Sync | Async, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A server without the route, or one that answers anything there."""
    for models in (answer({}, 404), answer(b"<html>"), answer({"data": []})):
        server.models = models
        asker._ask(lambda client: client.warm_up(choose_window([], None), print))
    assert "Ollama" not in caplog.text
