"""Every fault kind does what the table in ``tests/fakes/fake_ollama.py`` says."""

import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead, RemoteDisconnected
from typing import Any

import pytest

from tests.fakes import fake_ollama
from tests.fakes.fake_ollama import INTENTS, SENTIMENTS, TOPICS, FakeOllama, expected_labels
from tests.fakes.fake_ollama_client import TEXT, Answer, chat, open_chat, post, read_to_end, strike
from tests.fakes.fake_ollama_server.faults import EMBED_KINDS, KINDS, STATUS_KINDS, STREAM_KINDS

RIGHT = expected_labels(TEXT, INTENTS, TOPICS, SENTIMENTS)
DEEPEST = 100_000


# In the answer: kind, parameters, what must be true of the answer


def plain(answer: Answer) -> Any:
    return json.loads(answer.content)


def invalid(answer: Answer) -> bool:
    with pytest.raises(ValueError, match=r"Expecting|Invalid|Extra|Unterminated"):
        json.loads(answer.content)
    return True


def deep(answer: Answer, depth: int) -> bool:
    return answer.content.count("[") == depth and answer.content.count("]") == depth


REPLY_CASES: list[tuple[str, dict[str, Any], Callable[[Answer], bool]]] = [
    (
        "done_false",
        {},
        lambda a: a.json["done"] is False and set(a.json) == {"model", "created_at", "message", "done"},
    ),
    ("done_false", {"cut": False}, lambda a: plain(a) == RIGHT and a.json["done"] is False),
    ("missing_done", {}, lambda a: "done" not in a.json and plain(a) == RIGHT),
    ("empty_content", {}, lambda a: a.content == "" and a.json["done_reason"] == "stop"),
    ("thinking_only", {}, lambda a: a.content == "" and a.json["message"]["thinking"] != ""),
    (
        "length",
        {},
        lambda a: invalid(a) and a.json["done_reason"] == "length" and a.json["eval_count"] == 700,
    ),
    ("length", {"cut": False}, lambda a: plain(a) == RIGHT and a.json["done_reason"] == "length"),
    ("done_reason_load", {}, lambda a: a.content == "" and a.json["done_reason"] == "load"),
    ("invalid_json", {}, invalid),
    (
        "prose",
        {},
        lambda a: invalid(a) and "you asked for" in a.content and json.dumps(RIGHT["intent"]) in a.content,
    ),
    (
        "code_fence",
        {},
        lambda a: json.loads(a.content.removeprefix("```json\n").removesuffix("\n```")) == RIGHT,
    ),
    ("wrong_label", {}, lambda a: plain(a) == RIGHT | {"intent": "Existential Dread"}),
    ("wrong_label", {"field": "topic", "value": "x"}, lambda a: plain(a) == RIGHT | {"topic": "x"}),
    ("missing_field", {}, lambda a: set(plain(a)) == {"categorization", "intent", "sentiment"}),
    ("extra_field", {}, lambda a: plain(a) == RIGHT | {"confidence": 0.93}),
    (
        "duplicate_keys",
        {},
        lambda a: a.content.startswith('{"intent": "Other",') and a.content.count('"intent"') == 2,
    ),
    ("nan", {}, lambda a: '"intent":NaN' in a.content),
    ("number_label", {}, lambda a: plain(a)["intent"] == 7),
    ("huge", {}, lambda a: len(plain(a)["categorization"]) == 10_000_000),
    ("deep_json", {}, lambda a: deep(a, 1000)),
    ("deep_json", {"depth": DEEPEST}, lambda a: deep(a, DEEPEST)),
    ("deep_json", {"depth": DEEPEST, "where": "outer"}, lambda a: a.body == b"[" * DEEPEST + b"]" * DEEPEST),
    (
        "lone_surrogate",
        {},
        lambda a: r"\ud83d" in a.content and plain(a)["categorization"].endswith("\ud83d"),
    ),
    ("lone_surrogate", {"where": "outer"}, lambda a: b'\\ud83d\\"' in a.body and "\ud83d" in a.content),
    ("nul", {}, lambda a: plain(a)["categorization"].endswith("\0")),
    ("nul", {"where": "outer"}, lambda a: "\0" in a.content),
    ("control_chars", {}, lambda a: plain(a)["categorization"].endswith("\x07\x1b[31m\n\u202e")),
    ("raw_control_chars", {}, lambda a: invalid(a) and "\x07" in a.content),
    ("bom", {}, lambda a: json.loads(a.content.removeprefix("\ufeff")) == RIGHT and a.content[0] == "\ufeff"),
    ("bom", {"where": "outer"}, lambda a: a.body.startswith(b"\xef\xbb\xbf{")),
    ("padded_json", {}, lambda a: plain(a) == RIGHT and len(a.content) > 4000),
    ("unconstrained", {}, lambda a: invalid(a) and a.content.startswith("The customer is")),
    ("half_window", {}, lambda a: plain(a) == RIGHT and a.json["prompt_eval_count"] == 2050),
    (
        "no_counters",
        {},
        lambda a: plain(a) == RIGHT and "eval_count" not in a.json and a.json["done"] is True,
    ),
    ("message_null", {}, lambda a: a.json["message"] is None),
    ("clock_jump", {"seconds": -86_400 * 400}, lambda a: a.json["created_at"][:4] < time.strftime("%Y")),
    ("slow_headers", {"bytes_per_s": 20_000}, lambda a: plain(a) == RIGHT),
    ("slow_body", {"bytes_per_s": 20_000}, lambda a: plain(a) == RIGHT),
]


@pytest.mark.parametrize(("kind", "params", "holds"), REPLY_CASES)
def test_reply_fault(ollama: FakeOllama, kind: str, params: dict[str, Any], holds: Callable[[Answer], bool]) -> None:
    strike(ollama, kind, times=1, **params)
    struck = chat(ollama)
    assert struck.status == 200
    assert holds(struck)
    assert plain(chat(ollama)) == RIGHT
    assert ollama.stats()["faults_served"] == {kind: 1}
    assert [record["fault"] for record in ollama.requests()] == [kind, None]


@pytest.mark.parametrize("kind", sorted(STATUS_KINDS))
def test_status_fault(ollama: FakeOllama, kind: str) -> None:
    strike(ollama, kind, times=1)
    answer = chat(ollama)
    status, message = STATUS_KINDS[kind]
    message = {"model_not_found_404": "model 'llama3.2' not found"}.get(kind, message)
    assert answer.status == status == int(kind[-3:])
    if kind == "overflow_400":
        error = json.loads(answer.json["error"])["error"]
        assert (error["type"], error["n_ctx"], error["n_prompt_tokens"]) == (
            "exceed_context_size_error",
            4096,
            8192,
        )
    else:
        assert answer.json == {"error": message}
    assert chat(ollama).status == 200


def test_status_with_a_body_and_headers_of_the_test(ollama: FakeOllama) -> None:
    strike(ollama, "status", status=429, headers={"Retry-After": "3"}, body={"error": "slow down"})
    answer = chat(ollama)
    assert (answer.status, answer.headers["Retry-After"], answer.json) == (429, "3", {"error": "slow down"})
    strike(ollama, "status", status=503)
    assert chat(ollama).json == {"error": "server busy, please try again.  maximum pending requests exceeded"}
    strike(ollama, "status", status=200, body="[1, 2]", content_type="text/plain")
    assert (chat(ollama).body, chat(ollama).headers["Content-Type"]) == (b"[1, 2]", "text/plain")


@pytest.mark.parametrize("kind", ["html_200", "html_502"])
def test_page_of_a_proxy(ollama: FakeOllama, kind: str) -> None:
    strike(ollama, kind)
    answer = chat(ollama)
    assert (answer.status, answer.headers["Content-Type"]) == (int(kind[-3:]), "text/html")
    assert answer.body.startswith(b"<html>")


# On the wire


def test_close_without_a_reply(ollama: FakeOllama) -> None:
    strike(ollama, "close")
    with pytest.raises(RemoteDisconnected):
        chat(ollama)
    assert [record["outcome"] for record in ollama.requests()] == ["dropped"]
    assert ollama.stats()["client_disconnects"] == 0


def test_reset_at_once_and_after_some_bytes(ollama: FakeOllama) -> None:
    strike(ollama, "reset")
    with open_chat(ollama) as opened, pytest.raises(ConnectionResetError):
        opened.recv(1)
    strike(ollama, "reset_after", bytes=12)
    with open_chat(ollama) as opened:
        assert opened.recv(100) == b"HTTP/1.1 200"
        with pytest.raises(ConnectionResetError):
            opened.recv(1)
    assert ollama.stats()["client_disconnects"] == 0


def test_hang_holds_its_slot_unless_told_otherwise(ollama: FakeOllama) -> None:
    ollama.configure(slots=1)
    strike(ollama, "hang", when={"text": "parcel"})
    with open_chat(ollama):
        ollama.wait_for("running", 1)
        with open_chat(ollama, "Customer: hello"):
            ollama.wait_for("queued", 1)
    ollama.wait_for("in_flight", equals=0)
    strike(ollama, "hang", when={"text": "parcel"}, hold_slot=False)
    with open_chat(ollama):
        ollama.wait_for("in_flight", 1)
        assert chat(ollama, "Customer: hello").status == 200
    ollama.wait_for("in_flight", equals=0)
    assert ollama.stats()["client_disconnects"] >= 2


def test_garbage_instead_of_http(ollama: FakeOllama) -> None:
    strike(ollama, "garbage")
    with open_chat(ollama) as opened:
        assert read_to_end(opened).startswith(b"SSH-2.0")


def test_slow_body_comes_byte_by_byte(ollama: FakeOllama) -> None:
    strike(ollama, "slow_body", bytes_per_s=5)
    with open_chat(ollama) as opened:
        head, _, begun = opened.recv(4096).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        while not begun:
            begun = opened.recv(4096)
        assert len(begun) < 20  # of more than 100; a busy machine reads late
    ollama.wait_for("client_disconnects", 1)


def test_slow_headers_come_byte_by_byte(ollama: FakeOllama) -> None:
    strike(ollama, "slow_headers", bytes_per_s=5)
    with open_chat(ollama) as opened:
        begun = opened.recv(4096)
    assert begun
    assert b"HTTP/1.1 200 OK\r\n".startswith(begun)


def test_body_shorter_than_promised(ollama: FakeOllama) -> None:
    strike(ollama, "truncated_body")
    with pytest.raises(IncompleteRead):
        chat(ollama)


def test_half_a_json_of_the_promised_length(ollama: FakeOllama) -> None:
    strike(ollama, "half_json")
    answer = chat(ollama)
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        answer.json  # noqa: B018


# Streams


def test_stream_faults(ollama: FakeOllama) -> None:
    strike(ollama, "stream_no_final")
    assert [line["done"] for line in chat(ollama, stream=True).lines] == [False] * 8
    strike(ollama, "stream_error_line")
    *begun, last = chat(ollama, stream=True).lines
    assert last == {"error": "an error was encountered while running the model: unexpected EOF"}
    assert 0 < len(begun) < 8
    strike(ollama, "stream_truncate")
    with open_chat(ollama, stream=True) as opened:
        received = read_to_end(opened)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(received.rpartition(b"\r\n")[2])
    strike(ollama, "reset_after")
    with open_chat(ollama, stream=True) as opened, pytest.raises(ConnectionResetError):
        read_to_end(opened)
    strike(ollama, "done_false")
    assert not any(line["done"] for line in chat(ollama, stream=True).lines)


def test_stream_faults_on_a_plain_request(ollama: FakeOllama) -> None:
    strike(ollama, "stream_no_final")
    assert chat(ollama).json["done"] is False
    strike(ollama, "stream_error_line")
    assert chat(ollama).status == 500
    strike(ollama, "stream_truncate")
    with pytest.raises(IncompleteRead):
        chat(ollama)


def test_stream_broken_in_its_middle_by_a_crash(ollama: FakeOllama) -> None:
    ollama.configure(latency_s=60.0, slots=2, stream_chunks=1000)
    ollama.configure(
        faults=[
            {"kind": "latency", "set_s": 0.0, "when": {"indexes": [1]}},
            {"kind": "runner_crash", "when": {"indexes": [1]}},
        ]
    )
    with open_chat(ollama, stream=True) as opened:
        assert opened.recv(10) == b"HTTP/1.1 2"
        assert chat(ollama).status == 500
        received = read_until(opened, b"0\r\n\r\n")
    assert b'{"error":"model runner has unexpectedly stopped' in received


def read_until(opened: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        piece = opened.recv(65536)
        assert piece
        received += piece
    return received


# The model


def test_runner_crash_fails_all_that_run_and_the_next_request_loads(ollama: FakeOllama) -> None:
    ollama.configure(slots=2, latency_s=60.0)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(chat, ollama)
        ollama.wait_for("running", 1)
        ollama.configure(latency_s=0.0, faults=[{"kind": "runner_crash", "times": 1}])
        crashed = chat(ollama)
        assert (crashed.status, running.result().status) == (500, 500)
    assert crashed.json["error"].startswith("model runner has unexpectedly stopped")
    assert ollama.stats()["loaded_models"] == 0
    assert chat(ollama).status == 200
    stats = ollama.stats()
    assert (stats["loads"], stats["running"], stats["in_flight"]) == (2, 0, 0)


def test_unload_makes_the_next_request_load(ollama: FakeOllama) -> None:
    strike(ollama, "unload", times=1)
    assert (plain(chat(ollama)), plain(chat(ollama))) == (RIGHT, RIGHT)
    assert ollama.stats()["loads"] == 2


def test_fault_at_the_answer_takes_the_slot_first(ollama: FakeOllama) -> None:
    ollama.configure(latency_s=0.01)
    strike(ollama, "busy_503", stage="answer")
    assert chat(ollama).status == 503
    stats = ollama.stats()
    assert (stats["max_running"], stats["running"], stats["loads"]) == (1, 0, 1)
    ollama.reset()
    strike(ollama, "busy_503", delay_s=0.01)
    assert chat(ollama).status == 503
    assert ollama.stats()["loads"] == 0


def test_latency_faults_add_up_beside_another(ollama: FakeOllama) -> None:
    ollama.configure(
        latency_s=0.001,
        faults=[
            {"kind": "latency", "factor": 10, "when": {"from": 1, "to": 1}},
            {"kind": "wrong_label"},
            {"kind": "latency", "add_s": 0.005},
        ],
    )
    for _ in range(3):
        assert plain(chat(ollama))["intent"] == "Existential Dread"
    stats = ollama.stats()
    assert stats["simulated_s_sum"] == pytest.approx(0.006 + 0.015 + 0.006)
    assert stats["faults_served"] == {"latency": 4, "wrong_label": 3}


def test_embed_faults(ollama: FakeOllama) -> None:
    request = {"model": "nomic-embed-text", "input": ["good", "a poison text"]}
    strike(ollama, "embed_short")
    assert len(post(ollama, "/api/embed", request).json["embeddings"]) == 1
    strike(ollama, "embed_dims")
    assert [len(vector) for vector in post(ollama, "/api/embed", request).json["embeddings"]] == [768, 767]
    strike(ollama, "embed_nan_400", when={"path": "/api/embed", "text": "poison"})
    answer = post(ollama, "/api/embed", request)
    assert (answer.status, answer.json) == (400, {"error": "embedding contains NaN or Inf values"})
    assert post(ollama, "/api/embed", request | {"input": ["good"]}).status == 200
    strike(ollama, "reset", when={"path": "/api/embed"})
    with pytest.raises(ConnectionResetError):
        post(ollama, "/api/embed", request)


def test_every_kind_is_tested_and_documented() -> None:
    tested = {kind for kind, _, _ in REPLY_CASES} | set(STATUS_KINDS) | STREAM_KINDS | EMBED_KINDS
    tested |= {"status", "html_200", "html_502", "close", "reset", "reset_after", "hang", "garbage"}
    tested |= {"truncated_body", "half_json", "runner_crash", "unload", "latency"}
    assert tested == KINDS
    documented = set(re.findall(r"^    ([a-z_0-9]+(?:, [a-z_0-9]+)*)  ", fake_ollama.__doc__ or "", re.MULTILINE))
    names = {name for entry in documented for name in entry.split(", ")}
    assert sorted(KINDS - names) == []
