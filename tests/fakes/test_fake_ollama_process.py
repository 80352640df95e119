"""The server process: start, stop, records, and what the class refuses."""

import os
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import fake_ollama
from tests.fakes.fake_ollama import FakeOllama, FakeOllamaError, lognormal_latency, text_sha256
from tests.fakes.fake_ollama_client import TEXT, chat, chat_body, open_chat, post, send
from tests.fakes.fake_ollama_server.knobs import Knobs

# The process


def test_restart_keeps_the_port_and_the_knobs(ollama: FakeOllama) -> None:
    with FakeOllama(slots=3) as other:
        port, pid = other.port, other.pid
        other.configure(version="9.9")
        other.kill()
        with pytest.raises(ConnectionRefusedError):
            send(other, "GET", "/")
        other.restart()
        assert other.port == port
        assert other.pid != pid
        assert send(other, "GET", "/api/version").json == {"version": "9.9"}


def test_stop_resets_open_connections() -> None:
    with FakeOllama(latency_s=60.0) as fake, open_chat(fake) as opened:
        fake.wait_for("running", 1)
        fake.stop()
        with pytest.raises(ConnectionResetError):
            opened.recv(1)


def test_paused_server_accepts_and_never_answers() -> None:
    with FakeOllama() as fake:
        fake.pause()
        with open_chat(fake) as opened:
            opened.settimeout(0.1)
            with pytest.raises(TimeoutError):
                opened.recv(1)
            fake.resume()
            opened.settimeout(10)
            assert opened.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("pause", [False, True])
def test_server_dies_with_a_killed_parent(pause: bool) -> None:
    root = str(Path(__file__).resolve().parents[2])
    code = f"""
import sys, time
sys.path.insert(0, {root!r})
from tests.fakes.fake_ollama import FakeOllama
fake = FakeOllama()
fake.start()
if {pause}:
    fake.pause()
print(fake.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = os.pidfd_open(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    ended, _, _ = select.select([server], [], [], 60)
    os.close(server)
    assert ended


def test_mistakes_in_knobs_are_refused(ollama: FakeOllama) -> None:
    for wrong in (
        {"slot": 3},
        {"era": "middle"},
        {"faults": [{"kind": "flood"}]},
        {"faults": [{"kind": "close", "when": {"x": 1}}]},
    ):
        with pytest.raises(FakeOllamaError, match=r"use one of|must be one of"):
            ollama.configure(**wrong)
    assert chat(ollama).status == 200


def test_waiting_in_vain_is_an_error(ollama: FakeOllama) -> None:
    with pytest.raises(FakeOllamaError, match="running did not get there"):
        ollama.wait_for("running", 1, timeout_s=0.01)
    with pytest.raises(FakeOllamaError, match="unknown gauge"):
        ollama.wait_for("runing", 1)


def test_every_knob_is_documented() -> None:
    text = fake_ollama.__doc__ or ""
    assert [name for name in Knobs.__dataclass_fields__ if name not in text] == []


# Records


def test_record_tells_the_shape_of_a_request_and_not_its_text(ollama: FakeOllama) -> None:
    before_s = time.monotonic()
    body = chat_body(keep_alive="1h30m", truncate=False, shift=False, think=False)
    post(ollama, "/api/chat", body, headers={"X-Request-ID": "req-7"})
    (record,) = ollama.requests()
    assert before_s <= record.pop("start_s") <= record.pop("end_s") <= time.monotonic()
    sha = text_sha256(TEXT)
    assert record == {
        "index": 0,
        "path": "/api/chat",
        "request_id": "req-7",
        "outcome": "200",
        "fault": None,
        "user_sha256": sha,
        "last_sha256": sha,
        "longest_sha256": sha,
        "model": "llama3.2",
        "message_count": 2,
        "options": body["options"],
        "format_sent": True,
        "stream": False,
        "think": False,
        "truncate": False,
        "shift": False,
        "keep_alive_s": 5400.0,
    }


def test_records_are_bounded_and_can_be_switched_off(ollama: FakeOllama) -> None:
    ollama.configure(record_limit=2)
    for _ in range(3):
        chat(ollama)
    assert [record["index"] for record in ollama.requests()] == [1, 2]
    ollama.configure(record=False)
    chat(ollama)
    stats = ollama.stats()
    assert (len(ollama.requests()), stats["chat_requests"], stats["answered"]) == (2, 4, 4)
    assert stats["calls_by_sha"] == {text_sha256(TEXT): 4}
    ollama.reset()
    assert (ollama.requests(), ollama.stats()["chat_requests"]) == ([], 0)


@pytest.mark.parametrize("key", ["index", "text"])
def test_simulated_times_are_those_of_the_pure_function(ollama: FakeOllama, key: str) -> None:
    ollama.configure(latency="lognormal", mean_s=0.004, sigma=0.7, seed=5, latency_key=key, slots=8)
    texts = [f"conversation {number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: chat(ollama, text), texts))
    keys: list[Any] = list(range(24)) if key == "index" else texts
    times_s = [lognormal_latency(5, one, 0.004, 0.7) for one in keys]
    stats = ollama.stats()
    assert stats["simulated_s_sum"] == pytest.approx(sum(times_s))
    assert stats["simulated_s_max"] == pytest.approx(max(times_s))
    assert stats["busy_slot_s"] > 0


def test_mean_of_the_lognormal_latency() -> None:
    times_s = [lognormal_latency(1, index, 2.0, 0.5) for index in range(20_000)]
    assert sum(times_s) / len(times_s) == pytest.approx(2.0, rel=0.02)
    assert lognormal_latency(1, "text", 2.0, 0.0) == 2.0
