"""The measurement of slots, against a model server that has a known number of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands.diagnosis.slots import (
    Call,
    Level,
    Measurement,
    Round,
    calls_that_waited,
    levels_up_to,
    measure,
    without_second_attempts,
)
from config import load_settings
from tests.environment import clean_environment
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_ollama_client import chat
from tests.fakes.scripted_server import Handler, answer, scripted_server
from tests.forked_process import run_forked
from tests.in_process import run_script
from tests.test_openai_chat import reasoning_model
from utils import concurrency_check

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "utils" / "concurrency_check.py"


@pytest.fixture(scope="module")
def running_fake() -> Iterator[FakeOllama]:
    with FakeOllama(latency_s=0.1) as server:
        yield server


@pytest.fixture
def fake(running_fake: FakeOllama) -> FakeOllama:
    running_fake.renew()
    return running_fake


def run(server: FakeOllama, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Return what the script prints with --json."""
    place = environment or {"OLLAMA_ENDPOINT": server.url, "OLLAMA_MODEL": "llama3.2"}
    done = run_script(concurrency_check.main, SCRIPT, ["--json", *arguments], clean_environment() | place, ROOT)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert isinstance(measured, dict)
    return measured


@pytest.mark.parametrize(
    ("slots", "levels"),
    [
        *(
            pytest.param(slots, levels, marks=pytest.mark.thorough)
            for slots, levels in ((1, [1, 2, 4]), (8, [1, 2, 4, 8, 16]))
        ),
        (4, [1, 2, 4, 8]),
    ],
)
def test_slots_are_found(slots: int, levels: list[int]) -> None:
    with FakeOllama(slots=slots, latency_s=0.2) as server:
        measured = run(server, "--max", str(levels[-1]))
    assert (measured["slots"], measured["slots_is_minimum"], measured["queue_wait_from"]) == (slots, False, "server")
    assert [level["at_once"] for level in measured["levels"]] == levels
    assert [level["waited"] for level in measured["levels"]] == [max(0, at_once - slots) for at_once in levels]


def test_slots_that_are_no_power_of_two(fake: FakeOllama) -> None:
    fake.configure(slots=3)
    assert run(fake, "--max", "7", "--rounds", "1")["slots"] == 3


def test_a_server_with_more_slots_than_were_tried(fake: FakeOllama) -> None:
    fake.configure(slots=8)
    measured = run(fake, "--max", "4", "--rounds", "1")
    assert (measured["slots"], measured["slots_is_minimum"]) == (4, True)


@pytest.mark.thorough
def test_a_server_that_does_not_tell_its_queue_is_judged_by_latency() -> None:
    with FakeOllama(slots=2, latency_s=0.4) as server:
        environment = {"LLM_API_URL": f"{server.url}/v1/chat/completions", "LLM_MODEL": "llama3.2:latest"}
        measured = run(server, "--max", "4", "--rounds", "1", environment=environment)
    assert (measured["slots"], measured["queue_wait_from"]) == (2, "latency")
    assert measured["levels"][-1]["queue_wait_s_max"] is None


def test_it_warms_up_first_and_sends_as_many_as_it_says(fake: FakeOllama) -> None:
    run(fake, "--max", "4", "--rounds", "2")
    assert fake.stats()["chat_requests"] == 1 + 2 * (1 + 2 + 4)


@pytest.mark.parametrize(
    ("loaded", "set_to", "asked"),
    [(16_384, None, 16_384), (4096, None, 4096), (None, None, 8192), (16_384, 4096, 4096)],
    ids=["larger", "smaller", "not loaded", "set"],
)
def test_it_asks_with_the_window_that_is_loaded(
    fake: FakeOllama, loaded: int | None, set_to: int | None, asked: int
) -> None:
    """With another one the server would load the model again, under the worker that uses it. What is set is taken."""
    if loaded is not None:
        assert chat(fake, options={"num_ctx": loaded}, shift=False).status == 200
    before = len(fake.requests())
    environment = {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2"}
    if set_to is not None:
        environment["OLLAMA_NUM_CTX"] = str(set_to)
    measured = run(fake, "--max", "2", "--rounds", "1", environment=environment)
    sent = fake.requests()[before:]
    assert sent
    assert {request["options"]["num_ctx"] for request in sent} == {asked}
    assert measured["num_ctx"] == asked
    assert fake.stats()["loads"] == (2 if loaded not in (None, asked) else 1)


def test_the_table_is_for_people(fake: FakeOllama) -> None:
    fake.configure(slots=2)
    command = ["-m", "utils.concurrency_check", "--max", "4", "--rounds", "1", "--model", "llama3.2"]
    done = run_forked(command, clean_environment() | {"OLLAMA_ENDPOINT": fake.url}, ROOT)
    assert done.returncode == 0, done.stderr
    assert "answers/s" in done.stdout
    assert "2 of 4" in done.stdout
    assert done.stdout.endswith("The server runs 2 at once; --max-concurrent 3 keeps one call ready for a free slot.\n")


def test_a_server_that_becomes_busy_ends_the_measurement(fake: FakeOllama) -> None:
    """Warm-up and the levels 1 and 2 are calls 0 to 3; one call of the level of 4 meets the error, and is not repeated."""
    fake.configure(slots=1, faults=[{"kind": "busy_503", "when": {"indexes": [5]}}])
    measured = run(fake, "--max", "8", "--rounds", "1")
    assert [level["at_once"] for level in measured["levels"]] == [1, 2]
    assert measured["stopped"].startswith("with 4 at once: ")
    assert measured["slots"] == 1


def test_an_answer_that_is_no_use_still_took_its_time(fake: FakeOllama) -> None:
    fake.configure(slots=2, faults=[{"kind": "empty_content"}])
    assert run(fake, "--max", "4", "--rounds", "1")["slots"] == 2


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--model", "llama3.2", "--ollama-endpoint", "http://127.0.0.1:1"], 3, "no connection to the model server"),
        (["--model", "x:cloud"], 2, "cloud"),
        (["--ollama-endpoint", "ftp://nonsense"], 2, "OLLAMA_ENDPOINT"),
    ],
)
def test_errors_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, named: str
) -> None:
    assert concurrency_check.main(arguments) == code
    assert named in capsys.readouterr().err


def test_a_missing_model_is_named_with_those_there_are(fake: FakeOllama, capsys: pytest.CaptureFixture[str]) -> None:
    assert concurrency_check.main(["--model", "mistral", "--ollama-endpoint", fake.url]) in (2, 3)
    assert "llama3.2:latest" in capsys.readouterr().err


def test_a_server_that_cannot_serve_even_one_call_is_an_error(
    fake: FakeOllama, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.configure(faults=[{"kind": "busy_503"}])
    assert concurrency_check.main(["--model", "llama3.2", "--ollama-endpoint", fake.url]) == 3
    assert capsys.readouterr().out == ""


# Arithmetic


def one_round(*waits_s: float | None, service_s: float = 1.0) -> Round:
    return tuple(Call(service_s + (wait_s or 0.0), wait_s) for wait_s in waits_s)


@pytest.mark.parametrize(
    ("waits_s", "waited"),
    [([0.0, 0.0], 0), ([0.0, 1.0], 1), ([0.0, 0.3], 0), ([0.0, 0.9, 2.0, 3.1], 3), ([0.4], 0)],
)
def test_who_waited_about_one_service_time_waited_for_a_slot(waits_s: list[float], waited: int) -> None:
    assert calls_that_waited(one_round(*waits_s)) == waited


@pytest.mark.parametrize(("last_waits_s", "slots"), [([1.0, 0.0, 1.0], 1), ([0.0, 1.0, 0.0], 2)])
def test_one_odd_round_changes_nothing(last_waits_s: list[float], slots: int) -> None:
    rounds = tuple(one_round(0.0, wait_s) for wait_s in last_waits_s)
    assert Measurement("m", "", (Level(2, rounds),), None).slots == slots


def test_more_at_once_is_not_enough_if_answers_do_not_come_faster() -> None:
    """All slots share one machine: four at once take four times as long, though nobody waits."""
    levels = [Level(k, (tuple(Call(float(k), 0.0) for _ in range(k)),)) for k in (1, 2, 4)]
    measurement = Measurement("m", "", tuple(levels), None)
    assert (measurement.slots, measurement.is_minimum, measurement.enough) == (4, True, 1)


@pytest.mark.parametrize(("at_most", "levels"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_levels(at_most: int, levels: list[int]) -> None:
    assert levels_up_to(at_most) == levels


def test_progress_is_shown_without_a_terminal(fake: FakeOllama) -> None:
    """On a CPU a measurement takes many minutes, and the user gets one hint about this."""
    fake.configure(vram_share=0.0, latency_s=0.0)
    environment = clean_environment() | {"OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2"}
    done = run_script(concurrency_check.main, SCRIPT, ["--max", "2", "--rounds", "2"], environment, ROOT)
    assert done.returncode == 0, done.stderr
    assert [f"{n} at once, round {k} of 2 ..." in done.stderr for n in (1, 2) for k in (1, 2)] == [True] * 4
    assert done.stderr.count("runs on the CPU only") == 1
    assert "at once, round" not in done.stdout


async def test_probe_learns_from_refusals_as_a_run_does() -> None:
    """A reasoning model refuses ``max_tokens`` and a temperature; later requests of the probe have neither."""

    def step(handler: Handler) -> None:
        status, fields = reasoning_model(handler.server_state.requests[-1].json)
        answer(fields, status)(handler)

    with scripted_server() as server:
        server.models = answer({"data": [{"id": "prod-1"}]})
        server.script.extend([step] * 20)
        settings = load_settings(None, llm_api_url=f"{server.url}/v1/chat/completions", llm_model="prod-1")
        measured = await measure(without_second_attempts(settings), 2, 1, lambda _: None)
        assert [level.at_once for level in measured.levels] == [1, 2]
        assert ["max_tokens" in request.json for request in server.chats] == [True] + [False] * 5
