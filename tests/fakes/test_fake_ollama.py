"""The fake behaves like Ollama where a classification client can see it."""

import json
import socket
from typing import Any

import pytest

from tests.fakes import fake_ollama
from tests.fakes.fake_ollama import (
    INTENTS,
    SENTIMENTS,
    TOPICS,
    FakeOllama,
    expected_labels,
    text_sha256,
)
from tests.fakes.fake_ollama_client import (
    SCHEMA,
    TEXT,
    chat,
    chat_body,
    http_request,
    post,
    read_to_end,
    send,
)

# Labels


def test_labels_are_those_of_the_pure_function_in_the_order_of_the_schema(ollama: FakeOllama) -> None:
    answer = chat(ollama)
    labels = json.loads(answer.content)
    assert labels == expected_labels(TEXT, INTENTS, TOPICS, SENTIMENTS)
    assert list(labels) == list(SCHEMA["properties"])
    assert answer.headers["X-Fake-User-Sha256"] == text_sha256(TEXT)


def test_labels_come_from_the_enums_that_were_sent(ollama: FakeOllama) -> None:
    properties = {
        "sentiment": {"enum": ["Sad"]},
        "intent": {"$ref": "#/$defs/I"},
        "urgency": {"type": "integer"},
    }
    schema = {"type": "object", "properties": properties, "$defs": {"I": {"enum": ["Ask", "Buy"]}}}
    labels = json.loads(chat(ollama, format=schema).content)
    assert list(labels) == ["sentiment", "intent", "urgency"]
    assert labels["intent"] == expected_labels(TEXT, ["Ask", "Buy"], TOPICS, SENTIMENTS)["intent"]
    assert labels["sentiment"] == "Sad"
    assert isinstance(labels["urgency"], int)


def test_different_texts_spread_over_all_labels() -> None:
    labels = [expected_labels(f"text {number}", INTENTS, TOPICS, SENTIMENTS) for number in range(500)]
    assert {label["intent"] for label in labels} == set(INTENTS)
    assert {label["topic"] for label in labels} == set(TOPICS)
    assert {label["sentiment"] for label in labels} == set(SENTIMENTS)


REPAIR_TURN = [
    {"role": "system", "content": "Label it."},
    {"role": "user", "content": "an example that is longer than the conversation to be labelled"},
    {"role": "assistant", "content": "{}"},
    {"role": "user", "content": "the conversation"},
    {"role": "assistant", "content": "not JSON"},
    {"role": "user", "content": "Answer again in JSON"},
]


@pytest.mark.parametrize(("rule", "place"), [("longest", 1), ("last", 5), (1, 3)])
def test_knob_says_which_user_message_counts(ollama: FakeOllama, rule: str | int, place: int) -> None:
    ollama.configure(user_message=rule)
    answer = chat(ollama, messages=REPAIR_TURN)
    text = REPAIR_TURN[place]["content"]
    assert json.loads(answer.content) == expected_labels(text, INTENTS, TOPICS, SENTIMENTS)
    assert ollama.stats()["calls_by_sha"] == {text_sha256(text): 1}
    (record,) = ollama.requests()
    assert record["user_sha256"] == text_sha256(text)
    assert record["last_sha256"] == text_sha256(REPAIR_TURN[5]["content"])
    assert record["longest_sha256"] == text_sha256(REPAIR_TURN[1]["content"])


def test_lone_surrogate_in_a_request_is_accepted_as_in_go(ollama: FakeOllama) -> None:
    labels = json.loads(chat(ollama, "caf\ud83d").content)
    assert labels == expected_labels("caf\ud83d", INTENTS, TOPICS, SENTIMENTS)
    assert labels == expected_labels("caf\ufffd", INTENTS, TOPICS, SENTIMENTS)


# Errors, word for word


NATIVE_ERRORS = [
    ("/api/chat", b"", 400, "missing request body"),
    ("/api/chat", b"xyz", 400, "invalid character 'x' looking for beginning of value"),
    ("/api/chat", b'{"model": NaN}', 400, "invalid character 'N' looking for beginning of value"),
    ("/api/chat", b'{"model": "a"', 400, "unexpected EOF"),
    (
        "/api/chat",
        {"model": 7},
        400,
        "json: cannot unmarshal number into Go struct field ChatRequest.model of type string",
    ),
    ("/api/chat", {"model": ""}, 400, "model is required"),
    ("/api/generate", {"model": ""}, 404, "model '' not found"),
    ("/api/chat", {"model": "a b"}, 400, "invalid model name"),
    ("/api/chat", {"model": "foo"}, 404, "model 'foo' not found"),
    ("/api/generate", {"model": "foo"}, 404, "model 'foo' not found"),
    ("/api/embed", {"model": "foo", "input": "x"}, 404, 'model "foo" not found, try pulling it first'),
    ("/api/embed", {"model": "nomic-embed-text", "input": ["x", 1]}, 400, "invalid input type"),
    ("/api/show", {}, 400, "model is required"),
    ("/api/embed", {"model": "a b", "input": "x"}, 400, "invalid model name"),
    (
        "/api/embed",
        {"model": "llama3.2", "input": "x"},
        501,
        "This server does not support embeddings. Start it with `--embeddings`",
    ),
    ("/api/show", {"model": "foo"}, 404, "model 'foo:latest' not found"),
    ("/api/show", {"name": "library/foo:1b"}, 404, "model 'foo:1b' not found"),
    ("/api/show", {"model": "a b"}, 400, "invalid model name"),
    ("/api/chat", chat_body(model="nomic-embed-text"), 400, '"nomic-embed-text" does not support chat'),
    ("/api/chat", chat_body(think=True), 400, '"llama3.2" does not support thinking'),
    (
        "/api/chat",
        chat_body(think="lots"),
        400,
        'invalid think value: "lots" (must be "high", "medium", "low", "max", true, or false)',
    ),
    ("/api/chat", chat_body(top_logprobs=21), 400, "top_logprobs must be between 0 and 20"),
    ("/api/chat", chat_body(keep_alive="10"), 400, 'time: missing unit in duration "10"'),
    ("/api/chat", chat_body(keep_alive="-10"), 400, 'time: missing unit in duration "-10"'),
    ("/api/chat", chat_body(keep_alive="5min"), 400, 'time: unknown unit "min" in duration "5min"'),
    ("/api/chat", chat_body(keep_alive="1h 30m"), 400, 'time: unknown unit "h " in duration "1h 30m"'),
    ("/api/chat", chat_body(keep_alive="forever"), 400, 'time: invalid duration "forever"'),
    ("/api/chat", chat_body(keep_alive=""), 400, 'time: invalid duration ""'),
    ("/api/chat", chat_body(keep_alive=True), 400, "Unsupported type: 'bool'"),
    ("/api/chat", chat_body(keep_alive=["5m"]), 400, "Unsupported type: '[]interface {}'"),
    ("/api/chat", chat_body(options={"num_ctx": "4k"}), 500, 'option "num_ctx" must be of type integer'),
    (
        "/api/chat",
        chat_body(format="xml"),
        500,
        'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object',
    ),
    ("/api/chat", chat_body(model="gpt-oss:120b-cloud"), 401, "unauthorized"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), NATIVE_ERRORS)
def test_errors_are_word_for_word(ollama: FakeOllama, path: str, body: Any, status: int, message: str) -> None:
    answer = post(ollama, path, body)
    assert answer.status == status
    assert answer.body == b'{"error":' + json.dumps(message).encode() + b"}"
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"


def test_error_text_is_escaped_as_by_go(ollama: FakeOllama) -> None:
    answer = chat(ollama, think="<&>")
    assert answer.body.startswith(rb'{"error":"invalid think value: \"\u003c\u0026\u003e\" (must be')


def test_openai_route_wraps_errors_in_its_own_shape(ollama: FakeOllama) -> None:
    answer = post(ollama, "/v1/chat/completions", {"model": "foo", "messages": [{"role": "user", "content": "x"}]})
    error = {"message": "model 'foo' not found", "type": "not_found_error", "param": None, "code": None}
    assert (answer.status, answer.json) == (404, {"error": error})
    assert post(ollama, "/v1/chat/completions", {"model": "llama3.2"}).json["error"]["type"] == "invalid_request_error"


def test_cloud_models_are_counted(ollama: FakeOllama) -> None:
    chat(ollama, model="gpt-oss:120b-cloud")
    chat(ollama, model="other:cloud")
    assert ollama.stats()["cloud_requests"] == 2


def test_unknown_options_and_fields_are_ignored(ollama: FakeOllama) -> None:
    assert chat(ollama, options={"num_predit": 1}, colour="red").status == 200


# The other routes


def test_liveness_version_and_listings(ollama: FakeOllama) -> None:
    assert send(ollama, "GET", "/").body == b"Ollama is running"
    assert send(ollama, "HEAD", "/").headers["Content-Length"] == "17"
    assert send(ollama, "HEAD", "/api/tags").body == b""
    assert send(ollama, "GET", "/api/version").json == {"version": "0.33.0"}
    ollama.configure(era="old")
    assert send(ollama, "GET", "/api/version").json == {"version": "0.24.0"}
    models = {entry["name"]: entry for entry in send(ollama, "GET", "/api/tags").json["models"]}
    assert list(models) == ["llama3.2:latest", "qwen3:8b", "nomic-embed-text:latest", "gpt-oss:120b-cloud"]
    assert models["gpt-oss:120b-cloud"]["remote_host"] == "https://ollama.com:443"
    assert len(models["qwen3:8b"]["digest"]) == 64
    assert send(ollama, "GET", "/v1/models").json["data"][0]["id"] == "llama3.2:latest"
    assert send(ollama, "GET", "/v1/models/llama3.2").json["object"] == "model"
    shown = post(ollama, "/api/show", {"model": "qwen3:8b"}).json
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shown["model_info"]["qwen3.context_length"] == 40960


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/nope", 404, b"404 page not found"),
        ("POST", "/v1/batches", 404, b"404 page not found"),
        ("POST", "//api/chat", 404, b"404 page not found"),
        ("GET", "/api/chat", 405, b"405 method not allowed"),
        ("DELETE", "/api/tags", 405, b"405 method not allowed"),
        ("POST", "/api/chat/", 307, b""),
    ],
)
def test_wrong_path_or_method(ollama: FakeOllama, method: str, path: str, status: int, body: bytes) -> None:
    answer = send(ollama, method, path, b"{}")
    assert (answer.status, answer.body) == (status, body)


def test_foreign_host_is_refused_until_switched_off(ollama: FakeOllama) -> None:
    headers = {"Host": "ollama.example.com"}
    assert send(ollama, "GET", "/api/version", headers=headers).status == 403
    assert send(ollama, "GET", "/api/version", headers={"Host": "box.local:11434"}).status == 200
    ollama.configure(check_host=False)
    assert send(ollama, "GET", "/api/version", headers=headers).status == 200


def test_models_can_be_replaced(ollama: FakeOllama) -> None:
    ollama.configure(models=["llama3.2", {"name": "tiny:1b", "context_length": 512, "capabilities": ["completion"]}])
    assert [entry["name"] for entry in send(ollama, "GET", "/api/tags").json["models"]] == [
        "llama3.2:latest",
        "tiny:1b",
    ]
    assert chat(ollama, model="tiny:1b").status == 200
    assert send(ollama, "GET", "/api/ps").json["models"][0]["context_length"] == 512


# Answers


def test_chat_answer_has_the_fields_of_ollama(ollama: FakeOllama) -> None:
    body = chat(ollama).json
    assert list(body) == [
        *("model", "created_at", "message", "done", "done_reason", "total_duration", "load_duration"),
        *("prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"),
    ]
    assert (body["model"], body["done"], body["done_reason"]) == ("llama3.2", True, "stop")
    assert body["prompt_eval_count"] == -(-len("Label it." + TEXT) // 4)
    assert body["created_at"].endswith("Z")
    ollama.configure(prompt_eval_count=0)
    assert "prompt_eval_count" not in chat(ollama).json


def test_num_predict_cuts_the_answer(ollama: FakeOllama) -> None:
    body = chat(ollama, options={"num_predict": 5}).json
    assert (body["done_reason"], body["eval_count"], len(body["message"]["content"])) == ("length", 5, 20)


def test_thinking_is_on_by_default_where_the_model_can(ollama: FakeOllama) -> None:
    assert chat(ollama, model="qwen3:8b").json["message"]["thinking"]
    assert "thinking" not in chat(ollama, model="qwen3:8b", think=False).json["message"]
    assert "thinking" not in chat(ollama, think=False).json["message"]


def test_white_space_under_a_schema_depends_on_the_text_and_changes_no_label(ollama: FakeOllama) -> None:
    """A grammar allows it: blank lines between the tokens, and after the last one; without a schema there is none."""
    answers = {text: chat(ollama, text).content for text in map("text {}".format, range(24))}
    for text, content in answers.items():
        assert json.loads(content) == expected_labels(text, INTENTS, TOPICS, SENTIMENTS)
        assert chat(ollama, text).content == content
    assert {"\n" in content for content in answers.values()} == {True, False}
    assert any("\n\n" in content.rstrip() and content.endswith("\n\n  ") for content in answers.values())
    assert not any("\n" in chat(ollama, text, format=None).content for text in answers)


def test_generate_answers_the_prompt(ollama: FakeOllama) -> None:
    body = post(ollama, "/api/generate", {"model": "llama3.2", "prompt": TEXT, "stream": False}).json
    assert json.loads(body["response"]) == expected_labels(TEXT, INTENTS, TOPICS, SENTIMENTS)
    assert body["done"] is True


def test_openai_answer_uses_the_json_schema_and_ignores_num_ctx(ollama: FakeOllama) -> None:
    body = {
        "model": "llama3.2",
        "messages": [{"role": "user", "content": TEXT}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "options": {"num_ctx": 9999},
        "max_tokens": 300,
    }
    answer = post(ollama, "/v1/chat/completions", body).json
    (choice,) = answer["choices"]
    assert json.loads(choice["message"]["content"]) == expected_labels(TEXT, INTENTS, TOPICS, SENTIMENTS)
    assert (choice["finish_reason"], answer["system_fingerprint"]) == ("stop", "fp_ollama")
    assert answer["usage"]["prompt_tokens"] == -(-len(TEXT) // 4)
    assert send(ollama, "GET", "/api/ps").json["models"][0]["context_length"] == 4096


@pytest.mark.parametrize("latency_s", [0.0, 0.02])
def test_stream_is_the_default_and_ends_with_the_metrics(ollama: FakeOllama, latency_s: float) -> None:
    ollama.configure(latency_s=latency_s, stream_chunks=4)
    answer = chat(ollama, stream=None)
    *middle, last = answer.lines
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert [line["done"] for line in middle] == [False] * 4
    text = "".join(line["message"]["content"] for line in middle)
    assert json.loads(text) == expected_labels(TEXT, INTENTS, TOPICS, SENTIMENTS)
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "stop", "")
    assert last["eval_count"] > 0


def test_openai_stream_is_server_sent_events(ollama: FakeOllama) -> None:
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    answer = post(ollama, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    events = [event.removeprefix("data: ") for event in answer.body.decode().split("\n\n") if event]
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert events.pop() == "[DONE]"
    assert json.loads(events[-1])["usage"]["completion_tokens"] > 0
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "stop"


def test_embed_keeps_the_order_and_normalises(ollama: FakeOllama) -> None:
    texts = ["late parcel", "parcel is late", "credit card stolen"]
    body = post(ollama, "/api/embed", {"model": "nomic-embed-text", "input": texts}).json
    vectors = body["embeddings"]
    assert [len(vector) for vector in vectors] == [768] * 3
    assert vectors == [pytest.approx(fake_ollama.fake_embedding(text, 768)) for text in texts]
    assert [sum(value * value for value in vector) for vector in vectors] == pytest.approx([1.0] * 3)
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert near > 0.5 > far
    assert body["prompt_eval_count"] == 3 + 4 + 5
    assert ollama.stats()["embed_inputs"] == 3


def test_embed_special_cases(ollama: FakeOllama) -> None:
    request = {"model": "nomic-embed-text", "input": ""}
    assert post(ollama, "/api/embed", request).json == {"model": "nomic-embed-text", "embeddings": []}
    assert len(post(ollama, "/api/embed", request | {"input": "x", "dimensions": 64}).json["embeddings"][0]) == 64
    long = request | {"input": "word " * 4000}
    assert post(ollama, "/api/embed", long).json["prompt_eval_count"] == 2048
    refused = post(ollama, "/api/embed", long | {"truncate": False})
    assert (refused.status, refused.json) == (400, {"error": "the input length exceeds the context length"})


def test_a_chat_model_makes_no_embeddings_since_each_runner_is_a_llama_server(ollama: FakeOllama) -> None:
    request = {"model": "llama3.2", "input": "late parcel"}
    assert post(ollama, "/api/embed", request).status == 501
    assert ollama.stats()["loads"] == 1  # only then it says so
    assert post(ollama, "/api/embed", request | {"input": []}).json["embeddings"] == []
    ollama.configure(era="old")
    assert len(post(ollama, "/api/embed", request).json["embeddings"]) == 1


# HTTP


def test_pipelined_and_chunked_requests(ollama: FakeOllama) -> None:
    raw = json.dumps(chat_body()).encode()
    chunked = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (raw[:5], len(raw) - 5, raw[5:])
    last = http_request("GET", "/api/version", headers="Connection: close\r\n")
    # The first answer is late, so that the others pile up behind it.
    ollama.configure(faults=[{"kind": "latency", "set_s": 0.05, "when": {"indexes": [0]}}])
    with socket.create_connection((ollama.host, ollama.port), timeout=10) as opened:
        opened.sendall(http_request("POST", "/api/chat", raw) * 100 + chunked + last)
        received = read_to_end(opened)
    assert received.count(b"HTTP/1.1 200 OK") == 102
    assert ollama.stats()["chat_requests"] == 101


def test_expect_continue_and_what_is_not_http(ollama: FakeOllama) -> None:
    with socket.create_connection((ollama.host, ollama.port), timeout=10) as opened:
        raw = json.dumps(chat_body()).encode()
        request = http_request("POST", "/api/chat", raw, "Expect: 100-continue\r\nConnection: close\r\n")
        opened.sendall(request[: -len(raw)])
        assert opened.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        opened.sendall(raw)
        assert read_to_end(opened).startswith(b"HTTP/1.1 200 OK")
    with socket.create_connection((ollama.host, ollama.port), timeout=10) as opened:
        opened.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert read_to_end(opened).startswith(b"HTTP/1.1 400 Bad Request")
