"""Slots, queues, loads, overflow: the fake schedules as Ollama does."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.fake_ollama import INTENTS, SENTIMENTS, TOPICS, FakeOllama, expected_labels, text_sha256
from tests.fakes.fake_ollama_client import TEXT, Answer, chat, chat_body, open_chat, post, read_to_end, send

NEVER_S = 600.0
BUSY = {"error": "server busy, please try again.  maximum pending requests exceeded"}


@pytest.fixture
def ollama(ollama: FakeOllama) -> Iterator[FakeOllama]:
    """Return the fake Ollama, and wait at the end until no request runs in it."""
    yield ollama
    ollama.wait_for("in_flight", equals=0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def queue_wait_ns(answer: Answer) -> int:
    body = answer.json
    parts = ("load_duration", "prompt_eval_duration", "eval_duration")
    return int(body["total_duration"]) - sum(int(body.get(name, 0)) for name in parts)


def prompt_share(answer: Answer) -> float:
    body = answer.json
    return float(body["prompt_eval_duration"] / (body["prompt_eval_duration"] + body["eval_duration"]))


# Slots


def test_a_loaded_model_takes_memory_for_its_whole_window_in_each_slot(ollama: FakeOllama) -> None:
    ollama.configure(slots=2, vram_share=0.5)
    on_disk = send(ollama, "GET", "/api/tags").json["models"][0]["size"]
    sizes = []
    for window in (4096, 8192):
        chat(ollama, options={"num_ctx": window})
        [entry] = send(ollama, "GET", "/api/ps").json["models"]
        assert entry["size_vram"] == entry["size"] // 2
        sizes.append(entry["size"] - on_disk)
    assert sizes == [2 * 4096 * 114_688, 2 * 8192 * 114_688]
    post(ollama, "/api/embed", {"model": "nomic-embed-text", "input": "x"})
    listed = {entry["name"]: entry["size"] for entry in send(ollama, "GET", "/api/ps").json["models"]}
    assert listed["nomic-embed-text:latest"] == on_disk


@pytest.mark.parametrize(("keep_alive", "years"), [("10m", 0), (-1, 292)])
def test_the_end_of_a_model_is_told_in_nanoseconds(ollama: FakeOllama, keep_alive: str | int, years: int) -> None:
    chat(ollama, keep_alive=keep_alive)
    [entry] = send(ollama, "GET", "/api/ps").json["models"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", entry["expires_at"])
    assert int(entry["expires_at"][:4]) - time.gmtime().tm_year in (years, years + 1)


def test_at_most_slots_generations_run_at_once(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(slots=3, latency_s=0.02)
    answers = list(pool.map(lambda number: chat(ollama, f"text {number}"), range(12)))
    stats = ollama.stats()
    assert {answer.status for answer in answers} == {200}
    assert (stats["max_running"], stats["running"], stats["queued"], stats["in_flight"]) == (3, 0, 0, 0)
    assert 3 < stats["max_in_flight"] <= 12
    assert stats["simulated_s_sum"] == pytest.approx(12 * 0.02)
    assert stats["busy_slot_s"] >= 0.9 * stats["simulated_s_sum"]


def test_waiting_for_a_slot_counts_into_the_total_duration(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(slots=1, latency_s=0.1)
    first = pool.submit(chat, ollama)
    ollama.wait_for("running", 1)
    second = pool.submit(chat, ollama)
    ollama.wait_for("queued", 1)
    waits_s = [queue_wait_ns(answer.result()) / 1e9 for answer in (first, second)]
    records = ollama.requests()
    assert waits_s == pytest.approx([0.0, records[0]["end_s"] - records[1]["start_s"]], abs=0.02)
    assert records[1]["start_s"] < records[0]["end_s"]
    assert prompt_share(first.result()) == pytest.approx(0.3, abs=0.01)


def test_a_cached_prefix_takes_a_twentieth_of_its_time_and_still_counts(ollama: FakeOllama) -> None:
    """As much of the time as the messages that differ have of the prompt; another model or a load begins anew."""
    ollama.configure(latency_s=0.005, prompt_eval_share=1.0)
    rules = {"role": "system", "content": "rule " * 200}
    first = [rules, {"role": "user", "content": "late parcel"}]
    same_rules = [rules, {"role": "user", "content": "lost card"}]
    half = [rules, {"role": "user", "content": "x" * 1000}]
    other_rules = [{"role": "system", "content": "label it"}, first[1]]
    answers = [chat(ollama, messages=messages) for messages in (first, same_rules, half, other_rules)]
    assert [prompt_share(answer) for answer in answers if "eval_duration" in answer.json] == pytest.approx(
        [0.05, 0.5], abs=0.001
    )
    assert answers[0].json["prompt_eval_count"] == pytest.approx(answers[1].json["prompt_eval_count"], abs=1)
    assert "eval_duration" not in chat(ollama, messages=other_rules, options={"num_ctx": 2048}).json  # loaded again


def test_loaded_model_queues_beyond_max_queue(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(slots=1, latency_s=0.01, max_queue=2)
    chat(ollama)
    answers = list(pool.map(lambda _: chat(ollama), range(16)))
    assert [answer.status for answer in answers] == [200] * 16
    assert ollama.stats()["max_queued"] > 2


def test_embedding_models_have_one_slot(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(slots=4, latency_s=0.02)
    request = {"model": "nomic-embed-text", "input": "x"}
    list(pool.map(lambda _: post(ollama, "/api/embed", request), range(4)))
    assert ollama.stats()["max_running"] == 1


def test_client_that_leaves_frees_its_slot(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(slots=1, latency_s=NEVER_S)
    with open_chat(ollama):
        ollama.wait_for("running", 1)
        ollama.configure(latency_s=0.0)
        waiting = pool.submit(chat, ollama)
        ollama.wait_for("queued", 1)
    assert waiting.result().status == 200
    stats = ollama.stats()
    assert (stats["client_disconnects"], stats["answered"], stats["running"]) == (1, 1, 0)
    assert [record["outcome"] for record in ollama.requests()] == ["client_disconnected", "200"]


def test_client_that_leaves_the_queue_is_forgotten(ollama: FakeOllama) -> None:
    ollama.configure(slots=1, latency_s=NEVER_S)
    with open_chat(ollama):
        ollama.wait_for("running", 1)
        with open_chat(ollama):
            ollama.wait_for("queued", 1)
        ollama.wait_for("client_disconnects", 1)
        assert ollama.stats()["queued"] == 0
    ollama.wait_for("client_disconnects", 2)
    assert ollama.stats()["max_running"] == 1


# Loads


def test_same_load_options_load_once(ollama: FakeOllama) -> None:
    for _ in range(3):
        chat(ollama)
    chat(ollama, options={"num_ctx": 4096, "temperature": 0.5, "num_predict": 5, "seed": 1})
    stats = ollama.stats()
    assert (stats["loads"], stats["reloads"]) == (1, 0)
    (entry,) = send(ollama, "GET", "/api/ps").json["models"]
    assert (entry["name"], entry["context_length"]) == ("llama3.2:latest", 4096)


@pytest.mark.parametrize(
    ("other", "reloads"),
    [
        ({"options": {"num_ctx": 8192}}, 2),
        ({"options": {"num_ctx": 4096, "num_batch": 64}}, 2),
        ({"options": {"num_ctx": 4096, "num_gpu": 1}}, 1),  # a request without num_gpu takes any
        ({"options": {"num_ctx": 4096, "main_gpu": 1}}, 2),
        ({"options": {"num_ctx": 4096, "use_mmap": False}}, 2),
        ({"options": {"num_ctx": 4096, "num_thread": 2}}, 2),
        ({"shift": False}, 2),
    ],
)
def test_other_load_options_reload(ollama: FakeOllama, other: dict[str, Any], reloads: int) -> None:
    chat(ollama)
    chat(ollama, **other)
    chat(ollama)
    assert ollama.stats()["reloads"] == reloads


def test_absent_num_ctx_means_the_default_window(ollama: FakeOllama) -> None:
    chat(ollama, options={"num_ctx": 8192})
    chat(ollama, options={})
    assert send(ollama, "GET", "/api/ps").json["models"][0]["context_length"] == 4096
    chat(ollama, options={"num_ctx": 4096})
    assert ollama.stats()["reloads"] == 1


def test_reload_waits_for_what_runs(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(latency_s=0.05)
    first = pool.submit(chat, ollama)
    ollama.wait_for("running", 1)
    second = pool.submit(chat, ollama, options={"num_ctx": 8192})
    assert (first.result().status, second.result().status) == (200, 200)
    stats = ollama.stats()
    assert (stats["max_in_flight"], stats["max_running"], stats["reloads"]) == (2, 1, 1)
    assert second.result().json["load_duration"] > first.result().json["load_duration"]


def test_full_pending_queue_answers_503(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(load_delay_s=NEVER_S, max_queue=2)
    with open_chat(ollama):
        ollama.wait_for("loading", 1)
        answers = [pool.submit(chat, ollama) for _ in range(5)]
        ollama.wait_for("pending", 2)
        ollama.wait_for("rejected", 3)
        ollama.configure(load_delay_s=0.0)
    assert sorted(answer.result().status for answer in answers) == [200, 200, 503, 503, 503]
    assert next(answer.result().json for answer in answers if answer.result().status == 503) == BUSY


def test_many_pending_requests_do_not_overflow_the_stack(ollama: FakeOllama) -> None:
    ollama.configure(load_delay_s=NEVER_S)
    with open_chat(ollama):
        opened = [open_chat(ollama) for _ in range(400)]
        ollama.wait_for("pending", 400)
        ollama.configure(load_delay_s=0.0)
    ollama.wait_for("answered", 400)
    for connection in opened:
        connection.close()
    assert ollama.stats()["loads"] == 2


def test_client_that_leaves_aborts_the_load_it_triggered(ollama: FakeOllama, pool: ThreadPoolExecutor) -> None:
    ollama.configure(load_delay_s=NEVER_S)
    with open_chat(ollama):
        ollama.wait_for("loading", 1)
        waiting = pool.submit(chat, ollama)
        ollama.wait_for("pending", 1)
        ollama.configure(load_delay_s=0.01)
    assert waiting.result().status == 200
    stats = ollama.stats()
    assert (stats["loads"], stats["load_aborts"], stats["client_disconnects"]) == (2, 1, 1)


def test_load_that_fails(ollama: FakeOllama) -> None:
    ollama.configure(load_error="llama-server process has terminated: signal: killed")
    answer = chat(ollama)
    assert (answer.status, answer.json["error"]) == (
        500,
        "llama-server process has terminated: signal: killed",
    )
    ollama.configure(load_error=None)
    assert chat(ollama).status == 200


def test_load_and_unload_without_messages(ollama: FakeOllama) -> None:
    loaded = chat(ollama, messages=[], options={}).json
    assert (loaded["done_reason"], loaded["message"]) == ("load", {"role": "assistant", "content": ""})
    assert len(send(ollama, "GET", "/api/ps").json["models"]) == 1
    assert chat(ollama, messages=[], options={}, keep_alive=0).json["done_reason"] == "unload"
    assert send(ollama, "GET", "/api/ps").json["models"] == []


def test_keep_alive_decides_when_the_model_goes(ollama: FakeOllama) -> None:
    chat(ollama, keep_alive=0)
    assert ollama.stats()["loaded_models"] == 0
    chat(ollama, keep_alive=-1)
    assert send(ollama, "GET", "/api/ps").json["models"][0]["expires_at"] > "2150"
    chat(ollama, keep_alive="20ms")
    ollama.wait_for("loaded_models", equals=0)
    assert ollama.stats()["unloads"] == 2


def test_idle_model_makes_room_for_another(ollama: FakeOllama) -> None:
    ollama.configure(max_loaded_models=1)
    chat(ollama)
    chat(ollama, model="qwen3:8b")
    assert [entry["name"] for entry in send(ollama, "GET", "/api/ps").json["models"]] == ["qwen3:8b"]
    stats = ollama.stats()
    assert (stats["loads"], stats["reloads"], stats["unloads"]) == (2, 0, 1)


# Prompts longer than the window

LONG = "Customer: " + "it is late. " * 2000
SENTENCE = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
    "context length in settings, or use a model with a longer context length"
)


def overflow_400(tokens: int, num_ctx: int) -> dict[str, str]:
    message = f"request ({tokens} tokens) exceeds the available context size ({num_ctx} tokens), try increasing it"
    inner = (
        f'{{"error":{{"code":400,"message":"{message}","type":"exceed_context_size_error",'
        f'"n_prompt_tokens":{tokens},"n_ctx":{num_ctx}}}}}'
    )
    return {"error": inner}


def labels_of(text: str) -> dict[str, str]:
    return expected_labels(text, INTENTS, TOPICS, SENTIMENTS)


def test_rendered_path_keeps_half_a_window_silently(ollama: FakeOllama) -> None:
    answer = chat(ollama, LONG)
    assert answer.json["prompt_eval_count"] == 2050
    tail = LONG[-2050 * 4 :]
    assert json.loads(answer.content) == labels_of(tail)
    assert answer.headers["X-Fake-User-Sha256"] == text_sha256(tail)


def test_truncate_false_turns_the_cut_into_a_400(ollama: FakeOllama) -> None:
    answer = chat(ollama, LONG, truncate=False)
    tokens = -(-len("Label it." + LONG) // 4)
    assert (answer.status, answer.json) == (400, overflow_400(tokens, 4096))


def test_shift_false_has_a_sentence_of_its_own(ollama: FakeOllama) -> None:
    answer = chat(ollama, LONG, shift=False)
    assert (answer.status, answer.json) == (400, {"error": SENTENCE})


def test_native_path_refuses_one_long_message(ollama: FakeOllama) -> None:
    ollama.configure(template_path="native")
    answer = chat(ollama, LONG)
    assert (answer.status, answer.json) == (400, overflow_400(-(-len("Label it." + LONG) // 4), 4096))


@pytest.mark.parametrize("path", ["native", "rendered"])
def test_oldest_messages_are_dropped_first(ollama: FakeOllama, path: str) -> None:
    ollama.configure(template_path=path, user_message="longest")
    messages = [
        *chat_body(LONG)["messages"],
        {"role": "assistant", "content": "{}"},
        {"role": "user", "content": TEXT},
    ]
    answer = chat(ollama, messages=messages)
    assert json.loads(answer.content) == labels_of(TEXT)
    assert answer.json["prompt_eval_count"] == -(-len("Label it." + "{}" + TEXT) // 4)


def test_old_era_fills_the_window_or_refuses(ollama: FakeOllama) -> None:
    ollama.configure(era="old")
    assert chat(ollama, LONG).json["prompt_eval_count"] == 4096
    answer = chat(ollama, LONG, truncate=False)
    assert (answer.status, answer.json) == (400, {"error": "the input length exceeds the context length"})


def test_without_shift_the_answer_ends_with_the_window(ollama: FakeOllama) -> None:
    fitting = "x" * (4096 * 4 - 60)
    body = chat(ollama, fitting, shift=False).json
    assert body["done_reason"] == "length"
    assert body["prompt_eval_count"] + body["eval_count"] == 4096
    assert chat(ollama, fitting).json["done_reason"] == "stop"


def test_stream_of_a_client_that_leaves_is_given_up(ollama: FakeOllama) -> None:
    ollama.configure(slots=1, latency_s=NEVER_S)
    with open_chat(ollama, stream=True):
        ollama.wait_for("running", 1)
    ollama.wait_for("running", equals=0)
    ollama.configure(latency_s=0.0)
    with open_chat(ollama, stream=True) as opened:
        ollama.wait_for("answered", 1)
        opened.shutdown(1)
        assert read_to_end(opened).endswith(b"0\r\n\r\n")
