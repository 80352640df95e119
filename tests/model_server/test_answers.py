"""Answers of model servers: usable answers, error classes, and unusable answers with status 200.

Statuses and bodies are those of Ollama's own source (github.com/ollama/ollama, server/routes.go and
server/sched.go, read at v0.33).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from domain.conversation import Message
from error_handler import (
    ErrorClass,
    LLMBusyError,
    LLMConnectionError,
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMRejectedError,
    LLMReplyError,
    LLMUnavailableError,
    Reason,
)
from model_server.protocol import (
    MAX_CHARACTERS_PER_TOKEN,
    NUM_PREDICT,
    ChatReply,
    ChatTarget,
    build_chat_body,
    parse_chat_response,
    parse_load_response,
    queue_wait_s,
)
from model_server.window import build_load_body

TARGET = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "llama3.2", None, 8192, "10m")
GENERATE = replace(TARGET, protocol="ollama_generate", url="http://m:1/api/generate")
OPENAI = replace(TARGET, protocol="openai_chat", url="http://m:1/v1/chat/completions", api_key="sk-secret")
TARGETS = {"ollama_chat": TARGET, "ollama_generate": GENERATE, "openai_chat": OPENAI}


def chat_reply(**changes: Any) -> dict[str, Any]:
    """A complete answer of /api/chat with fields changed; ``...`` removes one."""
    fields = {
        "model": "llama3.2",
        "created_at": "2025-09-24T10:30:00Z",
        "message": {"role": "assistant", "content": "{}"},
        "done": True,
        "done_reason": "stop",
        "total_duration": 5_000_000,
        "prompt_eval_count": 1500,
        "eval_count": 40,
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not ...}


def openai_reply(**choice: Any) -> dict[str, Any]:
    """A complete answer of /v1/chat/completions with fields of its one choice changed."""
    fields = {"index": 0, "message": {"role": "assistant", "content": "{}"}, "finish_reason": "stop", **choice}
    return {"id": "x", "choices": [fields], "usage": {"prompt_tokens": 1500, "completion_tokens": 40}}


def prompt_of(text: str) -> list[Message]:
    return [{"role": "system", "content": ""}, {"role": "user", "content": text}]


def parse(fields: Any, target: ChatTarget = TARGET, status: int = 200, characters: int = 6000) -> ChatReply:
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_chat_response(target, status, raw, prompt_of("." * characters))


def problem_of(fields: Any, target: ChatTarget = TARGET, status: int = 200, characters: int = 6000) -> LLMError:
    with pytest.raises(LLMError) as caught:
        parse(fields, target, status, characters)
    return caught.value


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        pytest.param(TARGET, chat_reply(), id="ollama_chat"),
        pytest.param(GENERATE, chat_reply(message=..., response="{}", context=[1, 2]), id="ollama_generate"),
        pytest.param(OPENAI, openai_reply(), id="openai_chat"),
    ],
)
def test_a_complete_answer(target: ChatTarget, fields: dict[str, Any]) -> None:
    """Text and token counts."""
    reply = parse(fields, target)
    assert (reply.text, reply.prompt_tokens, reply.reply_tokens) == ("{}", 1500, 40)


@pytest.mark.parametrize(
    ("durations", "queue_wait_s", "load_s"),
    [
        ((9_000_000_000, 2_000_000_000, 1_000_000_000, 3_500_000_000), 2.5, 2.0),
        ((4_000_000_000, ..., ..., 4_000_000_000), 0.0, 0.0),
        ((1_000_000, ..., 2_000_000, ...), 0.0, 0.0),
        ((..., 5, 5, 5), None, None),
    ],
    ids=["all", "zeros-left-out", "clock-jump", "no-total"],
)
def test_queue_wait_is_total_time_minus_the_work(
    durations: tuple[Any, ...], queue_wait_s: float | None, load_s: float | None
) -> None:
    """The rest of the total time after loading, reading and writing was spent in the queue."""
    names = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
    reply = parse(chat_reply(**dict(zip(names, durations, strict=True))), TARGET)
    assert (reply.queue_wait_s, reply.load_s) == (queue_wait_s, load_s)


@pytest.mark.parametrize("count", [..., None, "7", -1, True, 1.5])
def test_counters_that_are_missing_or_odd_are_none(count: Any) -> None:
    """Ollama leaves out zeros; values of another type are ignored."""
    reply = parse(chat_reply(prompt_eval_count=count, eval_count=count))
    assert (reply.prompt_tokens, reply.reply_tokens) == (None, None)


BODY_400 = (
    '{"error":"{\\"error\\":{\\"code\\":400,\\"message\\":\\"request (42947 tokens) exceeds the available context size (8192 '
    'tokens), try increasing it\\",\\"type\\":\\"exceed_context_size_error\\",\\"n_prompt_tokens\\":42947,\\"n_ctx\\":8192}}"}'
)
LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, "
    "adjust the context length in settings, or use a model with a longer context length"
)


def said(text: str) -> str:
    return json.dumps({"error": text})


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        pytest.param(400, said("missing request body"), LLMRejectedError, id="empty-body"),
        pytest.param(
            400, said("invalid character 'x' looking for beginning of value"), LLMRejectedError, id="bad-json"
        ),
        pytest.param(400, said("model is required"), LLMModelError, id="no-model-in-chat"),
        pytest.param(404, said("model '' not found"), LLMModelError, id="no-model-in-generate"),
        pytest.param(400, said("invalid model name"), LLMModelError, id="invalid-name"),
        pytest.param(404, said("model 'foo' not found"), LLMModelError, id="unknown-model"),
        pytest.param(404, said('model "foo" not found, try pulling it first'), LLMModelError, id="not-pulled"),
        pytest.param(404, "404 page not found", LLMModelError, id="wrong-path"),
        pytest.param(405, "405 method not allowed", LLMModelError, id="wrong-method"),
        pytest.param(302, "", LLMModelError, id="redirect"),
        pytest.param(400, said('"bert" does not support chat'), LLMModelError, id="cannot-chat"),
        pytest.param(400, said("top_logprobs must be between 0 and 20"), LLMRejectedError, id="out-of-range"),
        pytest.param(400, said('"llama3.2" does not support thinking'), LLMModelError, id="cannot-think"),
        pytest.param(
            500, said('invalid format: "\\"xml\\""; expected "json"'), LLMUnavailableError, id="invalid-format"
        ),
        pytest.param(500, said('option "num_ctx" must be of type integer'), LLMUnavailableError, id="option-type"),
        pytest.param(
            503, said("server busy, please try again.  maximum pending requests exceeded"), LLMBusyError, id="busy"
        ),
        pytest.param(429, said("too many requests"), LLMBusyError, id="rate-limit"),
        pytest.param(499, said("request canceled"), LLMUnavailableError, id="canceled"),
        pytest.param(500, said("llama-server process has terminated: exit 1"), LLMUnavailableError, id="load-failed"),
        pytest.param(500, said("timed out waiting for llama-server to start - x"), LLMUnavailableError, id="load-slow"),
        pytest.param(
            500, said("llama-server reported out-of-memory during startup: x"), LLMBusyError, id="out-of-memory"
        ),
        pytest.param(
            500, said("model requires more system memory (9 GiB) than is available (4 GiB)"), LLMBusyError, id="memory"
        ),
        pytest.param(500, said("x: this model may be incompatible with your version"), LLMUnavailableError, id="gguf"),
        pytest.param(
            500, said("model runner has unexpectedly stopped, this may be"), LLMUnavailableError, id="runner-died"
        ),
        pytest.param(
            500, said("an error was encountered while running the model: EOF"), LLMUnavailableError, id="mid-answer"
        ),
        pytest.param(500, said("prediction aborted, token repeat limit reached"), LLMUnavailableError, id="repeats"),
        pytest.param(400, BODY_400, LLMContextError, id="too-long-native"),
        pytest.param(400, said(LONG), LLMContextError, id="too-long-rendered"),
        pytest.param(400, said("the input length exceeds the context length"), LLMContextError, id="too-long-old"),
        pytest.param(
            400,
            '{"error":{"message":"This model\'s maximum context length is 4096 tokens","type":"BadRequestError"}}',
            LLMContextError,
            id="too-long-vllm",
        ),
        pytest.param(401, "", LLMModelError, id="no-key"),
        pytest.param(403, "", LLMModelError, id="foreign-host"),
        pytest.param(408, "", LLMUnavailableError, id="request-timeout"),
        pytest.param(425, "", LLMUnavailableError, id="too-early"),
        pytest.param(413, "", LLMRejectedError, id="too-large"),
        pytest.param(422, "", LLMRejectedError, id="unprocessable"),
        pytest.param(502, "<html>Bad gateway</html>", LLMUnavailableError, id="gateway"),
        pytest.param(504, "", LLMUnavailableError, id="gateway-timeout"),
        pytest.param(500, b"\xff\xfe", LLMUnavailableError, id="not-utf-8"),
    ],
)
@pytest.mark.parametrize("target", [TARGET, OPENAI], ids=["ollama", "openai"])
def test_http_status_decides_the_error(
    status: int, body: str | bytes, error: type[LLMError], target: ChatTarget
) -> None:
    """Each status and body maps to the error class that decides what follows."""
    problem = problem_of(body if isinstance(body, bytes) else body.encode(), target, status)
    assert type(problem) is error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LLMUnavailableError, ErrorClass.TRANSIENT),
        (LLMConnectionError, ErrorClass.TRANSIENT),
        (LLMBusyError, ErrorClass.RESOURCE),
        (LLMRejectedError, ErrorClass.PERMANENT),
        (LLMContextError, ErrorClass.PERMANENT),
        (LLMModelError, ErrorClass.PERMANENT),
        (LLMReplyError, ErrorClass.PERMANENT),
    ],
)
def test_error_classes(error: type[LLMError], kind: ErrorClass) -> None:
    """A reply is repaired, not repeated unchanged."""
    assert error.error_class is kind


@pytest.mark.parametrize("target", [TARGET, GENERATE, OPENAI], ids=lambda target: str(target.protocol))
@pytest.mark.parametrize("status", [200, 400, 401, 404, 422, 429, 500, 503])
def test_error_has_the_reason_of_the_server(status: int, target: ChatTarget) -> None:
    """Also one inside a 200; without a reason, the log of the server is named."""
    reason = "response_format is not supported by this model"
    assert str(problem_of(said(reason).encode(), target, status)).endswith(f"; the server says: {reason}")
    if status != 200:
        assert str(problem_of(b"{}", target, status)).endswith("; its log may say why")


@pytest.mark.parametrize("target", [TARGET, GENERATE, OPENAI], ids=lambda target: str(target.protocol))
@pytest.mark.parametrize("status", [200, 400, 401, 404, 422, 429, 500, 503])
def test_error_never_quotes_the_prompt(status: int, target: ChatTarget) -> None:
    """Servers echo what they refuse: a name, a number, or the whole request."""
    prompt = "Customer: I am Xaver Quabeck, order 77123. Where is it?"
    messages: list[Message] = [{"role": "system", "content": "Label it."}, {"role": "user", "content": prompt}]
    for quote in (prompt, prompt.upper(), "near 'Quabeck'", "where is it", "order 77123", json.dumps(messages)):
        with pytest.raises(LLMError) as caught:
            parse_chat_response(target, status, said(f"cannot render: {quote}").encode(), messages)
        for word in ("xaver", "quabeck", "77123", "where is it"):
            assert word not in str(caught.value).casefold()


def test_error_tells_a_missing_key_from_a_wrong_one() -> None:
    assert "requires a key (HTTP 401); check LLM_API_KEY" in str(problem_of(b"{}", replace(OPENAI, api_key=None), 401))
    refused = str(problem_of(said("bad key: s3cret-key").encode(), replace(OPENAI, api_key="s3cret-key"), 403))
    assert "refused the key (HTTP 403); check LLM_API_KEY; the server says: bad key: ***" in refused
    assert "s3cret" not in refused


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param(chat_reply(done=False, done_reason=...), Reason.CUT_OFF, id="1-done-false"),
        pytest.param(chat_reply(done=...), Reason.CUT_OFF, id="1-done-missing"),
        pytest.param(chat_reply(done="true"), Reason.CUT_OFF, id="1-done-is-text"),
        pytest.param(chat_reply(done_reason="length"), Reason.CUT_OFF, id="3-length"),
        pytest.param(chat_reply(message={"content": ""}), Reason.EMPTY, id="4-empty"),
        pytest.param(chat_reply(message={"content": " \n"}), Reason.EMPTY, id="4-white-space"),
        pytest.param(chat_reply(message={"content": "", "thinking": "Hm."}), Reason.EMPTY, id="4-thinking-only"),
        pytest.param(chat_reply(message=None), Reason.EMPTY, id="message-null"),
        pytest.param(chat_reply(message={"content": 5}), Reason.EMPTY, id="content-is-number"),
        pytest.param(chat_reply(prompt_eval_count=4098), Reason.CONTEXT_OVERFLOW, id="6-half-window"),
        pytest.param(chat_reply(prompt_eval_count=8192), Reason.CONTEXT_OVERFLOW, id="6-whole-window"),
        pytest.param(chat_reply(message={"content": ""}, done_reason="load"), Reason.EMPTY, id="7-load"),
        pytest.param(chat_reply(message={"content": ""}, done_reason="unload"), Reason.EMPTY, id="7-unload"),
    ],
)
def test_unusable_200_is_a_reply_error(fields: dict[str, Any], reason: Reason) -> None:
    """Each is a failure with its own reason, never an answer."""
    problem = problem_of(fields, characters=40_000)
    assert isinstance(problem, LLMReplyError)
    assert problem.reason is reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param(openai_reply(finish_reason=None), Reason.CUT_OFF, id="aborted"),
        pytest.param(openai_reply(finish_reason="length"), Reason.CUT_OFF, id="length"),
        pytest.param(openai_reply(message={"content": None}), Reason.EMPTY, id="no-content"),
        pytest.param(openai_reply(message=None), Reason.EMPTY, id="no-message"),
        pytest.param({"choices": []}, Reason.CUT_OFF, id="no-choices"),
        pytest.param({"choices": ["x"]}, Reason.CUT_OFF, id="odd-choices"),
        pytest.param({"choices": None, "usage": 3}, Reason.CUT_OFF, id="null-choices"),
    ],
)
def test_unusable_200_of_openai_is_a_reply_error(fields: dict[str, Any], reason: Reason) -> None:
    """The same for /v1/chat/completions."""
    problem = problem_of(fields, OPENAI)
    assert isinstance(problem, LLMReplyError)
    assert problem.reason is reason


@pytest.mark.parametrize("protocol", TARGETS)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>Sign in</html>", id="html"),
        pytest.param(b'{"message": {"content": "{', id="half"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"error": "unexpected EOF"}', id="error-in-the-body"),
        pytest.param(b'{"error": {"message": "x"}}', id="error-object-in-the-body"),
        pytest.param(json.dumps(chat_reply()).encode() + b'\n{"error": "x"}', id="error-line-after-the-answer"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"message": {"content": "\xff"}}', id="not-utf-8"),
    ],
)
def test_unreadable_200_is_retried(body: bytes, protocol: str) -> None:
    """The transport failed, not the document."""
    assert type(problem_of(body, TARGETS[protocol])) is LLMUnavailableError


# Cut prompts


@pytest.mark.parametrize("num_ctx", [2048, 4096, 8192, 32768])
def test_a_prompt_cut_to_half_the_window_is_refused(num_ctx: int) -> None:
    """Servers from 0.30 on keep about half of it and still answer 200."""
    target = replace(TARGET, num_ctx=num_ctx)
    half = num_ctx // 2 + 2
    long_prompt = round(half * MAX_CHARACTERS_PER_TOKEN) + 1
    assert (
        problem_of(chat_reply(prompt_eval_count=half), target, characters=long_prompt).reason is Reason.CONTEXT_OVERFLOW
    )
    assert parse(chat_reply(prompt_eval_count=half), target, characters=half * 4).prompt_tokens == half


def test_a_prompt_cut_to_the_whole_window_is_refused() -> None:
    """Servers up to 0.24 keep as much as fits, which leaves no room for the answer."""
    assert problem_of(chat_reply(prompt_eval_count=8192 - NUM_PREDICT + 1)).reason is Reason.CONTEXT_OVERFLOW
    assert parse(chat_reply(prompt_eval_count=8192 - NUM_PREDICT)).prompt_tokens == 8192 - NUM_PREDICT


def test_answer_cut_off_by_a_full_window_is_context_overflow() -> None:
    """A repair turn would make the prompt even longer."""
    fields = chat_reply(prompt_eval_count=8000, done_reason="length", eval_count=192)
    assert problem_of(fields).reason is Reason.CONTEXT_OVERFLOW


def test_fewer_tokens_than_words_prove_a_cut_prompt() -> None:
    """No token spans two words; the limit leaves a margin of 10 %."""
    cut = chat_reply(prompt_eval_count=1500)
    with pytest.raises(LLMReplyError) as caught:
        parse_chat_response(TARGET, 200, json.dumps(cut).encode(), prompt_of("word " * 1700))
    assert caught.value.reason is Reason.CONTEXT_OVERFLOW
    enough = prompt_of("word " * 1600)
    assert parse_chat_response(TARGET, 200, json.dumps(cut).encode(), enough).prompt_tokens == 1500


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        (BODY_400, (42947, 8192)),
        (
            '{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_prompt_tokens":9000,"n_ctx":4096}}',
            (9000, 4096),
        ),
        (
            '{"message":"This model\'s maximum context length is 4096 tokens. However, you requested 5200 tokens '
            '(4500 in the messages, 700 in the completion)."}',
            (4500, 4096),
        ),
        (said(LONG), (None, None)),
    ],
    ids=["ollama", "llama.cpp", "vllm", "without"],
)
def test_refusal_of_a_long_prompt_keeps_the_reported_counts(body: str, counts: tuple[int | None, int | None]) -> None:
    """Also if its JSON is quoted inside JSON."""
    problem = problem_of(body.encode(), status=400)
    assert isinstance(problem, LLMContextError)
    assert (problem.prompt_tokens, problem.window_tokens) == counts


def test_load_request_has_the_options_of_a_call_and_no_messages() -> None:
    """Otherwise the first call would load the model again."""
    load = json.loads(build_load_body(GENERATE))
    call = json.loads(build_chat_body(TARGET, [{"role": "user", "content": "x"}], b"{}"))
    assert load.pop("messages") == []
    assert load.pop("format") is None
    del call["messages"], call["format"]
    assert load == call


@pytest.mark.parametrize(
    ("status", "fields", "error"),
    [
        (500, {"error": "llama-server process has terminated: exit 1"}, LLMUnavailableError),
        (500, {"error": "model requires more system memory (9 GiB) than is available (4 GiB)"}, LLMBusyError),
        (404, {"error": "model 'x' not found"}, LLMModelError),
        (200, {"done": True, "done_reason": "unload"}, LLMUnavailableError),
        (200, {"error": "out of memory"}, LLMUnavailableError),
    ],
)
def test_load_that_the_server_denies_is_an_error(status: int, fields: dict[str, Any], error: type[LLMError]) -> None:
    """Servers that emulate Ollama answer an empty chat like any other, so the reason need not be ``load``."""
    for reason in ("load", "stop", None):
        parse_load_response(TARGET, 200, json.dumps({"done": True, "done_reason": reason}).encode())
    with pytest.raises(error):
        parse_load_response(TARGET, status, json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("fields", "wait_s"),
    [
        (
            {
                "total_duration": 5_000_000_000,
                "load_duration": 1_000_000_000,
                "prompt_eval_duration": 1_000_000_000,
                "eval_duration": 1_000_000_000,
            },
            2.0,
        ),
        ({"total_duration": 5_000_000_000}, 5.0),
        ({"total_duration": 1, "eval_duration": 2}, 0.0),
        ({}, None),
        ({"total_duration": "x"}, None),
    ],
)
def test_queue_wait_is_the_rest_of_the_total_time(fields: dict[str, Any], wait_s: float | None) -> None:
    """Total time minus loading, reading the prompt and writing the answer; never negative."""
    assert queue_wait_s(fields) == wait_s
