"""The clients of the REST service, with a scripted HTTP server and with the real service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

import api_client
import api_client_production
from error_handler import ConfigurationError, ExitCode, RequestError, RunInterruptedError, SkippedDocumentError
from help_desks.reader import read_documents
from service.client.client import Pace
from service.client.protocol import build_request, parse_answer, parse_retry_after, request_for, service_target
from service.client.run import percentile
from tests.fakes.scripted_service import WAIT_S, Reply, ScriptedService, error, good, scripted_service
from tests.forked_process import ForkedProcess
from tests.worker.site import until

ROOT = Path(__file__).parents[2]
SECRET_TEXT = "the colour of my front door is vermilion"
NOW = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)


def document(number: int) -> dict[str, Any]:
    return {
        "conversation_number": str(number),
        "messages": [
            {"sender": "customer", "timestamp": "2026-11-21T10:00:00Z", "text": f"{SECRET_TEXT} {number}"},
            {"sender": "agent", "text": "One moment."},
        ],
    }


def write_file(folder: Path, count: int) -> Path:
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(document(number)) + "\n" for number in range(1, count + 1)))
    return path


def run_production(service: ScriptedService, file: Path, *flags: str) -> int:
    output = str(file.parent / "out")
    return api_client_production.main(["--file", str(file), "--url", service.url, "--output-dir", output, *flags])


def results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of the last run."""
    names = [path for path in (folder / "out").glob("classified_results_*.json") if "failures" not in path.name]
    return list(json.loads(max(names).read_bytes()))


def failures(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads(max((folder / "out").glob("*.failures.json")).read_bytes()))


def journals(folder: Path) -> list[Path]:
    return list((folder / "out").glob("*.journal.jsonl"))


def kept_numbers(folder: Path) -> list[str]:
    """Return the conversations in the journal, without torn lines."""
    lines = [line for path in journals(folder) for line in path.read_bytes().splitlines(keepends=True)[1:]]
    return [json.loads(line)["answer"]["conversation_number"] for line in lines if line.endswith(b"\n")]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0.0),
        (None, None),
        ("", None),
        ("-3", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
        ("9" * 400, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_date(value: str | None, seconds: float | None) -> None:
    """Both forms of the header; invalid values are ignored."""
    assert parse_retry_after(value, NOW) == seconds


def test_request_holds_the_original_texts_in_order() -> None:
    """Texts are sent unchanged; the aggregator decides who spoke."""
    text = "  <b>line one</b>\r\n\tCustomer: line two \u202e"
    request = request_for(
        {
            "_id": 7,
            "messages": [
                {"sender": "Client", "timestamp": "2026-11-21T11:00:00Z", "text": text, "seen_by": ["x"]},
                {"sender": "bot", "timestamp": "2026-11-21T10:00:00Z", "text": "Hello"},
                {"sender": "somebody", "text": "Hm"},
                {"sender": "agent", "text": None},
                "nonsense",
            ],
        },
        3,
    )
    assert json.loads(request.body) == {
        "conversation_number": "7",
        "messages": [
            {"sender": "customer", "timestamp": "2026-11-21T11:00:00Z", "text": text},
            {"sender": "agent", "timestamp": "2026-11-21T10:00:00Z", "text": "Hello"},
            {"sender": "agent", "text": "Hm"},
        ],
    }


def test_chat_exports_become_requests() -> None:
    """The service takes one shape only, so the fields of other programs are translated."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Where is it?"}], "created_at": 1714557600},
        {"author": {"type": "admin"}, "body": "On its way"},
        {"role": "tool", "content": None},
    ]
    body = json.loads(request_for({"tweets": [], "messages": messages}, 1).body)
    assert body["messages"] == [
        {"sender": "customer", "timestamp": "2024-05-01T10:00:00+00:00", "text": "Where is it?"},
        {"sender": "agent", "text": "On its way"},
    ]


def test_tweets_and_queries_become_requests() -> None:
    at = "Tue Oct 31 21:45:10 +0000 2017"
    tweets = [{"inbound": True, "created_at": at, "text": "@x help"}, {"inbound": "False", "text": "We do"}]
    body = json.loads(request_for({"conversation_number": 5.0, "tweets": tweets}, 1).body)
    assert body["conversation_number"] == "5"
    assert body["messages"] == [
        {"sender": "customer", "timestamp": "2017-10-31T21:45:10+00:00", "text": "@x help"},
        {"sender": "agent", "text": "We do"},
    ]
    query = json.loads(request_for({"text": "Where is it?", "processed": False}, 12).body)
    assert query == {"conversation_number": "12", "messages": [{"sender": "customer", "text": "Where is it?"}]}


def test_unsendable_documents_are_skipped_or_rejected() -> None:
    """Without text of the customer: skipped; half a surrogate pair: rejected."""
    with pytest.raises(SkippedDocumentError):
        request_for({"messages": [{"sender": "agent", "text": "Hello"}]}, 1)
    with pytest.raises(RequestError, match="surrogate"):
        request_for({"text": "caf\ud83d"}, 1)


def test_key_depends_only_on_the_content() -> None:
    """A status in the document does not change it; another text does."""
    first, second = document(1), document(1) | {"status": "processed"}
    assert request_for(first, 1).key == request_for(second, 9).key
    assert request_for(first, 1).key != request_for(document(2), 1).key


@pytest.mark.parametrize(
    "arguments",
    [{"url": "ftp://x"}, {"url": "http://u:p@x"}, {"url": "http://x:99999"}, {"url": "http://x", "api_key": "a b"}],
)
def test_invalid_target_is_rejected(arguments: dict[str, str]) -> None:
    """An address with credentials would appear in logs; a key with a space is no valid header."""
    with pytest.raises(ConfigurationError):
        service_target(**arguments)


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b'{"conversation_number": "2", "classification": {}}', json.dumps({
        "conversation_number": "other",
        "classification": dict.fromkeys(("intent", "topic", "sentiment", "categorization"), "x"),
    }).encode()],
)  # fmt: skip
def test_foreign_answer_with_status_200_is_an_error(body: bytes) -> None:
    """A page of a proxy, another service, or the answer to another conversation."""
    with pytest.raises(RequestError, match="not from this service"):
        parse_answer(build_request("2", []), 200, body, None)


def test_percentiles_are_nearest_ranks() -> None:
    values = array("d", reversed(range(1, 101)))
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile(values, 1.0)) == (50, 95, 100)
    assert percentile(array("d", [7]), 0.5) == 7


async def test_retry_after_lowers_the_limit_and_answers_raise_it() -> None:
    """Each Retry-After halves the limit, down to one; each answer adds a tenth."""
    pace = Pace(4, asyncio.Event())
    pace.slow_down(0)
    pace.slow_down(0)
    pace.slow_down(0)

    async def hold(entered: asyncio.Event, leave: asyncio.Event) -> None:
        async with pace.slot():
            entered.set()
            await leave.wait()

    leave = asyncio.Event()
    entered = [asyncio.Event() for _ in range(2)]
    tasks = [asyncio.create_task(hold(event, leave)) for event in entered]
    await entered[0].wait()
    assert not entered[1].is_set()
    assert pace.in_flight == 1
    for _ in range(11):
        pace.speed_up()
    leave.set()
    await asyncio.gather(*tasks)
    leave.clear()
    entered = [asyncio.Event() for _ in range(2)]
    tasks = [asyncio.create_task(hold(event, leave)) for event in entered]
    await asyncio.gather(*(event.wait() for event in entered))
    leave.set()
    await asyncio.gather(*tasks)


async def test_stop_ends_every_wait() -> None:
    """Even a Retry-After of minutes."""
    stop = asyncio.Event()
    pace = Pace(1, stop)
    pace.slow_down(500)
    waiting = asyncio.create_task(pace.wait(500))
    await asyncio.sleep(0)
    stop.set()
    with pytest.raises(RunInterruptedError):
        await waiting
    with pytest.raises(RunInterruptedError):
        async with pace.slot():
            pytest.fail("a slot was granted after the stop")


def test_results_are_in_file_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each request has the key and an id; no journal remains."""
    file = write_file(tmp_path, 20)
    (tmp_path / "key").write_text("s3cret-s3cret-s3cret\n")
    with scripted_service() as service:
        assert (
            run_production(service, file, "--concurrency", "4", "--api-key-file", str(tmp_path / "key"))
            == ExitCode.DONE
        )
        assert service.most_in_flight <= 4
    assert [row["conversation_number"] for row in results(tmp_path)] == [str(number) for number in range(1, 21)]
    assert all(row["messages"] and row["classification"]["intent"] == "Order Status" for row in results(tmp_path))
    assert journals(tmp_path) == []
    assert {request["headers"]["Authorization"] for request in service.requests} == {"Bearer s3cret-s3cret-s3cret"}
    assert len({request["headers"]["Idempotency-Key"] for request in service.requests}) == 20
    assert len({request["headers"]["X-Request-ID"] for request in service.requests}) == 20
    output = capsys.readouterr()
    assert "20 conversations: 20 classified now" in output.out
    assert "s3cret" not in output.out + output.err


def test_concurrency_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    file = write_file(tmp_path, 12)
    with scripted_service() as service:
        service.close()
        process = start_production(service, file, "--concurrency", "3")
        service.wait_until(lambda: service.held == 3)
        service.open.set()
        process.communicate(timeout=WAIT_S)
        assert process.returncode == ExitCode.DONE
        assert service.most_in_flight == 3


@pytest.mark.parametrize("status", [503, pytest.param(429, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_retry_waits_for_retry_after(tmp_path: Path, status: int, as_date: bool) -> None:
    """The retry has the same Idempotency-Key."""
    times: list[float] = []

    def busy_once(_number: str, nth: int) -> Reply:
        times.append(time.time())
        value = format_datetime(datetime.fromtimestamp(time.time() + 2, UTC), usegmt=True) if as_date else "1"
        return error(status, "QueueFullError", Retry_After=value) if nth == 1 else Reply()

    with scripted_service(busy_once) as service:
        assert run_production(service, write_file(tmp_path, 1)) == ExitCode.DONE
    first, second = times
    assert second >= (int(first + 2) if as_date else first + 1)
    assert len({request["headers"]["Idempotency-Key"] for request in service.requests}) == 1
    assert [request["headers"]["X-Request-ID"][-2:] for request in service.requests] == ["-1", "-2"]


def test_retry_after_delays_all_requests(tmp_path: Path) -> None:
    times: list[float] = []
    refused: list[float] = []

    def full_at_first(_number: str, _nth: int) -> Reply:
        times.append(time.monotonic())
        if len(times) == 3:
            refused.append(time.monotonic())
            return error(503, "QueueFullError", Retry_After="1")
        return Reply()

    with scripted_service(full_at_first) as service:
        assert run_production(service, write_file(tmp_path, 9), "--concurrency", "1") == ExitCode.DONE
    assert all(at >= refused[0] + 1 for at in times[3:])


def test_very_long_retry_after_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 and the time to wait."""
    with scripted_service(lambda number, nth: error(503, "ModelUnavailableError", Retry_After="86400")) as service:
        assert run_production(service, write_file(tmp_path, 3), "--concurrency", "1") == ExitCode.UNREACHABLE
        assert len(service.requests) == 1
    assert "retry after 86400 s" in capsys.readouterr().err


def test_failures_are_listed_without_text_and_retried_by_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """422 is not retried, 502 is; the second run requests only missing answers."""
    healed = False

    def some_fail(number: str, _nth: int) -> Reply:
        if number == "2":
            return Reply() if healed else error(422, "ValidationError", "messages[0].text: it is too long.")
        if number == "4":
            return Reply() if healed else error(502, "ModelAnswerError", "The model gave no usable answer.")
        return Reply()

    file = write_file(tmp_path, 5)
    with scripted_service(some_fail) as service:
        assert run_production(service, file, "--retries", "1") == ExitCode.INCOMPLETE
        assert service.asked == {"1": 1, "2": 1, "3": 1, "4": 2, "5": 1}
        assert [row["conversation_number"] for row in results(tmp_path)] == ["1", "3", "5"]
        lost = failures(tmp_path)
        assert [(row["position"], row["conversation_number"], row["type"], row["status"]) for row in lost] == [
            (2, "2", "ValidationError", 422),
            (4, "4", "ModelAnswerError", 502),
        ]
        assert lost[0]["message"] == "messages[0].text: it is too long."
        assert SECRET_TEXT not in json.dumps(lost)
        healed = True
        assert run_production(service, file) == ExitCode.DONE
        assert service.asked == {"1": 1, "2": 2, "3": 1, "4": 3, "5": 1}
    assert [row["conversation_number"] for row in results(tmp_path)] == ["1", "2", "3", "4", "5"]
    assert journals(tmp_path) == []
    assert SECRET_TEXT not in "".join(capsys.readouterr())


def test_error_text_of_a_foreign_server_is_not_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A proxy may quote customer text; only the service's own messages are kept."""
    quoting = Reply(400, {"error": {"type": "BadRequest", "message": f"cannot handle {SECRET_TEXT}"}})
    with scripted_service(lambda number, nth: quoting) as service:
        assert run_production(service, write_file(tmp_path, 1)) == ExitCode.INCOMPLETE
    assert failures(tmp_path)[0]["message"] == "Status 400 from another server; check --url and any proxy."
    assert SECRET_TEXT not in "".join(capsys.readouterr()) + json.dumps(failures(tmp_path))


def test_redirect_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target would receive the key and the conversation."""
    with scripted_service() as other:
        redirect = error(307, "AuthenticationError", Location=f"{other.url}/classify")
        with scripted_service(lambda number, nth: redirect) as service:
            flags = ("--api-key", "0123456789abcdef")
            assert run_production(service, write_file(tmp_path, 1), *flags) == ExitCode.CONFIGURATION
    assert not other.requests
    assert "--url" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "hint"), [(401, "--api-key-file"), (404, "--url")])
def test_configuration_error_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, hint: str
) -> None:
    """One error instead of ten thousand failures."""
    with scripted_service(lambda number, nth: error(status, "AuthenticationError")) as service:
        flags = ("--concurrency", "1", "--api-key", "not-this-one-no")
        assert run_production(service, write_file(tmp_path, 50), *flags) == ExitCode.CONFIGURATION
        assert len(service.requests) == 1
    message = capsys.readouterr().err
    assert hint in message
    assert "not-this-one-no" not in message
    assert journals(tmp_path) == []


def test_unreachable_service_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3; the message has the address."""
    with scripted_service() as service:
        pass
    assert run_production(service, write_file(tmp_path, 3), "--retries", "0") == ExitCode.UNREACHABLE
    assert service.url in capsys.readouterr().err


def test_timeout_fails_one_conversation_after_its_retries(tmp_path: Path) -> None:
    with scripted_service() as service:
        service.close()
        flags = ("--timeout", "1", "--retries", "1")
        assert run_production(service, write_file(tmp_path, 1), *flags) == ExitCode.INCOMPLETE
        assert len(service.requests) == 2
    assert failures(tmp_path)[0]["type"] == "TimeoutError"


def test_skipped_documents_are_listed_and_are_not_failures(tmp_path: Path) -> None:
    file = tmp_path / "conversations.json"
    silent = {"conversation_number": "9", "messages": [{"sender": "agent", "text": "Hello?"}]}
    file.write_text(json.dumps([document(1), silent, document(3)]))
    with scripted_service() as service:
        assert run_production(service, file) == ExitCode.DONE
        assert set(service.asked) == {"1", "3"}
    assert [(row["position"], row["skipped"]) for row in failures(tmp_path)] == [(2, "skipped_no_customer")]


def test_equal_conversations_are_never_in_flight_together(tmp_path: Path) -> None:
    """The second slot takes the next different conversation."""
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps([document(1), document(1), document(2)]))
    with scripted_service() as service:
        service.close()
        process = start_production(service, file, "--concurrency", "2")
        service.wait_until(lambda: service.held == 2)
        assert service.asked == {"1": 1, "2": 1}
        service.open.set()
        process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.DONE


def test_fatal_error_stops_all_workers(tmp_path: Path) -> None:
    """The others finish and keep their requests in flight and start no new ones."""
    first_is_told = threading.Event()

    def first_is_sent_away(number: str, _nth: int) -> Reply:
        if number == "1":
            first_is_told.set()
            return error(503, "ModelUnavailableError", Retry_After="86400")
        first_is_told.wait(WAIT_S)
        return Reply()

    with scripted_service(first_is_sent_away) as service:
        assert run_production(service, write_file(tmp_path, 60), "--concurrency", "2") == ExitCode.UNREACHABLE
        assert len(service.requests) < 60
        assert len(kept_numbers(tmp_path)) == len(service.requests) - 1


def test_equal_conversations_are_requested_once(tmp_path: Path) -> None:
    """Both entries of the file get the answer."""
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps([document(1), document(2), document(1)]))
    with scripted_service() as service:
        assert run_production(service, file, "--concurrency", "1") == ExitCode.DONE
        assert service.asked == {"1": 1, "2": 1}
    assert [row["conversation_number"] for row in results(tmp_path)] == ["1", "2", "1"]


def test_invalid_last_line_is_reported_before_the_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(tmp_path, 5)
    file.write_text(file.read_text() + "{broken\n")
    with scripted_service() as service:
        assert run_production(service, file) == ExitCode.CONFIGURATION
        assert not service.requests
    assert "line 6" in capsys.readouterr().err


def start_production(service: ScriptedService, file: Path, *flags: str) -> ForkedProcess:
    command = [str(ROOT / "api_client_production.py"), "--file", str(file), "--url", service.url]
    command += ["--output-dir", str(file.parent / "out"), *flags]
    return ForkedProcess(command, os.environ, ROOT, (file.parent / "said", file.parent / "log"))


@contextlib.contextmanager
def stuck_after(count: int, file: Path, concurrency: int) -> Iterator[tuple[ScriptedService, ForkedProcess]]:
    """Run the client until at least *count* requests are answered and *concurrency* more are held."""
    answered = 0

    def close_after(_number: str, _nth: int) -> Reply:
        nonlocal answered
        answered += 1
        if answered == count:
            service.close()
        return Reply()

    with scripted_service(close_after) as service:
        process = start_production(service, file, "--concurrency", str(concurrency))
        try:
            service.wait_until(lambda: service.held == concurrency)
            yield service, process
        finally:
            process.kill()
            process.communicate()


def test_killed_run_resumes_without_repeating_answers(tmp_path: Path) -> None:
    """Only requests in flight are repeated, with the same key."""
    file = write_file(tmp_path, 40)
    with stuck_after(15, file, 3) as (service, process):
        process.kill()
        process.wait(WAIT_S)
        kept = kept_numbers(tmp_path)
        assert len(kept) >= 12  # answers in transit at the kill may be lost
        assert list((tmp_path / "out").glob("classified_results_*Z.json")) == []
        service.behave = good
        service.open.set()
        assert run_production(service, file) == ExitCode.DONE
        assert {number for number, count in service.asked.items() if count > 1}.isdisjoint(kept)
        assert sum(service.asked.values()) <= 40 + 3 + (15 - len(kept))
        keys: dict[str, set[str]] = {}
        for request in service.requests:
            keys.setdefault(request["body"]["conversation_number"], set()).add(request["headers"]["Idempotency-Key"])
        assert all(len(values) == 1 for values in keys.values())
    assert [row["conversation_number"] for row in results(tmp_path)] == [str(number) for number in range(1, 41)]
    assert journals(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_interrupted_run_finishes_requests_in_flight(tmp_path: Path, number: signal.Signals) -> None:
    """No new request after the signal; the message tells how to resume."""
    file = write_file(tmp_path, 40)
    with stuck_after(6, file, 2) as (service, process):
        asked = len(service.requests)
        process.send_signal(number)
        until(lambda: "finishing the calls in flight" in (tmp_path / "log").read_text())
        service.open.set()
        _, rest = process.communicate(timeout=WAIT_S)
        assert process.returncode == ExitCode.INTERRUPTED
        assert len(service.requests) == asked
    assert len(kept_numbers(tmp_path)) == asked
    assert f"{asked} answers are kept in" in rest
    assert "run the same command again to resume" in rest
    assert list((tmp_path / "out").glob("classified_results_*Z.json")) == []


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A folder with a file of 3 conversations and a journal with 2 of their answers."""
    file = write_file(tmp_path, 3)

    def third_fails(number: str, _nth: int) -> Reply:
        return error(422, "ValidationError") if number == "3" else Reply()

    with scripted_service(third_fails) as service:
        assert run_production(service, file) == ExitCode.INCOMPLETE
    lines = journals(tmp_path)[0].read_bytes().splitlines(keepends=True)
    head = json.dumps({"service": "http://127.0.0.1:1"}).encode() + b"\n"
    journals(tmp_path)[0].write_bytes(head + b"".join(lines[1:]))
    return tmp_path


def test_answer_of_a_torn_line_is_requested_again(interrupted: Path) -> None:
    """A power failure can tear a line; only its answer is lost."""
    journal, file = journals(interrupted)[0], interrupted / "conversations.jsonl"
    with scripted_service() as service:
        lines = journal.read_bytes().splitlines(keepends=True)
        head = json.dumps({"service": service.url}).encode() + b"\n"
        journal.write_bytes(head + lines[1] + lines[2][:40])
        kept = json.loads(lines[1])["answer"]["conversation_number"]
        assert run_production(service, file) == ExitCode.DONE
        assert set(service.asked) == {"1", "2", "3"} - {kept}
    assert len(results(interrupted)) == 3


def test_answers_after_a_torn_line_are_kept(interrupted: Path) -> None:
    """The next answer starts a new line, so that the next run finds it."""
    journal, file = journals(interrupted)[0], interrupted / "conversations.jsonl"
    broken = True
    with scripted_service(
        lambda number, nth: error(422, "ValidationError") if broken and number == "3" else Reply()
    ) as service:
        head = json.dumps({"service": service.url}).encode() + b"\n"
        journal.write_bytes(head + b'{"key": "ab')
        assert run_production(service, file, "--concurrency", "1") == ExitCode.INCOMPLETE
        broken = False
        assert run_production(service, file) == ExitCode.DONE
        assert service.asked == {"1": 1, "2": 1, "3": 2}


def test_journal_of_another_service_is_rejected(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another service may use another model; --restart discards the journal."""
    file = interrupted / "conversations.jsonl"
    with scripted_service() as service:
        assert run_production(service, file) == ExitCode.CONFIGURATION
        assert "--restart" in capsys.readouterr().err
        assert not service.requests
        assert run_production(service, file, "--restart") == ExitCode.DONE
        assert service.asked == {"1": 1, "2": 1, "3": 1}


def test_two_runs_of_one_file_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_file(tmp_path, 40)
    with stuck_after(1, file, 2) as (service, process):
        asked = len(service.requests)
        for flags in ((), ("--restart",)):
            assert run_production(service, file, *flags) == ExitCode.LOCKED
        assert len(service.requests) == asked
        service.open.set()
        assert process.wait(WAIT_S) == ExitCode.DONE
    assert "Another run" in capsys.readouterr().err


def test_result_files_are_private(tmp_path: Path) -> None:
    with scripted_service() as service:
        run_production(service, write_file(tmp_path, 1))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}


def test_api_client_compares_labels_with_expected_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """The expected label is in brackets if it differs."""
    with scripted_service() as service:
        assert api_client.main(["--url", service.url, "--count", "3"]) == ExitCode.DONE
        assert all(len(request["body"]["messages"]) >= api_client.MIN_TURNS for request in service.requests)
    output = capsys.readouterr().out
    assert "Order Status" in output
    assert "(Technical" in output
    assert "3 of 3 answered" in output


def test_api_client_shows_the_fields_of_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    """Fields without an expected label are shown and not counted; a missing part of the triad is no error."""
    labels = {"intent": "Order Status", "urgency": "High", "channels": ["Phone", "Chat"]}

    def behave(number: str, nth: int) -> Reply:
        return Reply(body={"conversation_number": number, "messages": [], "classification": labels})

    with scripted_service(behave) as service:
        assert api_client.main(["--url", service.url, "--count", "1"]) == ExitCode.DONE
    output = capsys.readouterr().out
    assert "urgency" in output
    assert "Phone, Chat" in output
    assert re.search(r"1 of 1 answered; as expected: intent \d$", output, re.MULTILINE)


def test_api_client_exits_with_1_if_an_answer_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_service(lambda number, nth: error(422, "ValidationError") if number == "1" else Reply()) as service:
        assert api_client.main(["--url", service.url, "--count", "2"]) == ExitCode.INCOMPLETE
    assert "1 of 2 answered" in capsys.readouterr().out


def test_api_client_reports_a_wrong_key_and_an_unreachable_service(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes 2 and 3."""
    with scripted_service(lambda number, nth: error(401, "AuthenticationError")) as service:
        assert api_client.main(["--url", service.url]) == ExitCode.CONFIGURATION
    assert "--api-key-file" in capsys.readouterr().err
    assert api_client.main(["--url", service.url, "--count", "1"]) == ExitCode.UNREACHABLE


@pytest.fixture(scope="module")
def real_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real service with the baseline classifier and a key."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "API_KEYS": "tests:0123456789abcdef", "API_PORT": str(port), "LOG_LEVEL": "WARNING"}
    log = tmp_path_factory.mktemp("service") / "log"
    process = ForkedProcess([str(ROOT / "main.py"), "--embedded"], environment, ROOT, (log, log))
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the service ended"
                assert time.monotonic() < deadline, "the service did not start"
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(WAIT_S)


@pytest.mark.thorough
def test_real_service_accepts_every_sample(real_service: str, tmp_path: Path) -> None:
    """All shapes pass validation and come back as sent."""
    samples = ROOT / "data" / "sample_conversations.jsonl"
    flags = ["--file", str(samples), "--url", real_service, "--output-dir", str(tmp_path / "out")]
    assert api_client_production.main([*flags, "--api-key", "0123456789abcdef"]) == ExitCode.DONE
    sent = [json.loads(request_for(row, place).body) for place, row in enumerate(read_documents(samples), 1)]
    assert [row["messages"] for row in results(tmp_path)] == [row["messages"] for row in sent]


@pytest.mark.thorough
def test_real_service_rejects_a_wrong_key(real_service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert api_client.main(["--url", real_service, "--api-key", "0123456789abcdeX"]) == ExitCode.CONFIGURATION
    assert "--api-key-file" in capsys.readouterr().err
