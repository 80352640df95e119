"""The faults of the fake OpenAI that strike batches and their lines, as the official client sees them."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.fake_openai import FakeOpenAI, expected_content
from tests.fakes.fake_openai_client import (
    CHAT,
    client_of,
    content,
    documents,
    finished,
    ids,
    jsonl,
    lines_of,
    results,
    strike,
    submit,
    text_of,
)

# Batches


def test_a_batch_fails_as_told_and_the_next_one_does_not(fake: FakeOpenAI) -> None:
    errors = [{"code": "invalid_json_line", "line": 7, "message": "no"}, {"code": "new_code"}]
    fake.configure(
        faults=[
            {"kind": "fail", "when": {"indexes": [0]}, "errors": errors},
            {"kind": "token_limit_exceeded", "when": {"metadata": {"shard": "b"}}, "times": 1},
        ]
    )
    first = finished(fake, jsonl(documents(1)))
    assert first.status == "failed"
    assert first.errors is not None
    assert [(error.code, error.line) for error in first.errors.data or ()] == [
        ("invalid_json_line", 7),
        ("new_code", None),
    ]
    second = finished(fake, jsonl(documents(1)), metadata={"shard": "b"})
    assert second.errors is not None
    assert [error.code for error in second.errors.data or ()] == ["token_limit_exceeded"]
    assert finished(fake, jsonl(documents(1)), metadata={"shard": "b"}).status == "completed"
    assert fake.stats()["lines_submitted"] == 1


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"kind": "expire", "done": 0.25}, "expired", "batch_expired"),
        ({"kind": "cancel", "done": 0.25}, "cancelled", "batch_cancelled"),
    ],
)
def test_a_batch_ends_half_done(fake: FakeOpenAI, fault: Any, status: str, code: str) -> None:
    fake.configure(faults=[fault])
    done = finished(fake, jsonl(documents(8)), seconds=90_000)
    output, errors = results(fake, done)
    assert done.status == status
    assert (ids(output), len(errors)) == (["doc-0", "doc-1"], 6)
    assert {line["error"]["code"] for line in errors} == {code}
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 8, "completed": 2, "failed": 6}


def test_polls_reach_the_end_of_an_expiring_batch(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(polls_until_done=2, faults=[{"kind": "expire"}])
    batch = submit(client, jsonl(documents(2)))
    assert [client.batches.retrieve(batch.id).status for _ in range(2)] == ["in_progress", "expired"]


def test_statuses_are_unknown_or_held(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(
        polls_until_done=2,
        faults=[{"kind": "status_value", "polls": 1, "value": "paused"}, {"kind": "hold", "polls": 2}],
    )
    batch = submit(client, jsonl(documents(2)))
    seen = [client.batches.retrieve(batch.id) for _ in range(4)]
    assert [str(one.status) for one in seen] == ["paused", "finalizing", "finalizing", "completed"]
    assert [one.output_file_id is None for one in seen] == [True, True, True, False]
    assert seen[2].completed_at is None


def test_a_completed_batch_gets_its_file_ids_later(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    strike(fake, "late_output", polls=2)
    batch = submit(client, jsonl(documents(2)))
    fake.advance(1000)
    seen = [client.batches.retrieve(batch.id) for _ in range(3)]
    assert [one.status for one in seen] == ["completed"] * 3
    assert [one.output_file_id is None for one in seen] == [True, True, False]


def test_file_ids_are_missing_or_empty(fake: FakeOpenAI) -> None:
    strike(fake, "no_output_file")
    assert finished(fake, jsonl(documents(2))).output_file_id is None
    strike(fake, "empty_id")
    assert finished(fake, jsonl(documents(2))).error_file_id == ""
    strike(fake, "empty_error_file")
    done = finished(fake, jsonl(documents(2)))
    assert done.error_file_id
    assert content(fake, done.error_file_id) == b""


def test_only_an_error_file(fake: FakeOpenAI) -> None:
    strike(fake, "line_status", status=400)
    done = finished(fake, jsonl(documents(3)))
    assert (done.status, done.output_file_id) == ("completed", None)
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 3, "completed": 0, "failed": 3}
    assert ids(results(fake, done)[1]) == ["doc-0", "doc-1", "doc-2"]
    assert fake.stats()["lines_billed"] == 0


@pytest.mark.parametrize("value", [None, {"total": None, "completed": None, "failed": None}, {}])
def test_counts_are_null_or_hold_nulls(fake: FakeOpenAI, client: openai.OpenAI, value: Any) -> None:
    strike(fake, "counts", value=value)
    batch = finished(fake, jsonl(documents(1)))
    raw = json.loads(client.batches.with_raw_response.retrieve(batch.id).http_response.text)
    assert raw["request_counts"] == value


def test_a_batch_vanishes(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    strike(fake, "vanish", after_polls=1)
    batch = submit(client, jsonl(documents(1)))
    assert client.batches.retrieve(batch.id).status == "validating"
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        client.batches.retrieve(batch.id)
    assert client.batches.list().data == []


def test_the_output_file_is_gone(fake: FakeOpenAI) -> None:
    strike(fake, "output_gone")
    done = finished(fake, jsonl(documents(1)))
    with pytest.raises(openai.NotFoundError):
        content(fake, done.output_file_id)


def test_a_batch_has_its_own_timing(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(faults=[{"kind": "timing", "run_s": 5000, "when": {"indexes": [1]}}])
    first, second = submit(client, jsonl(documents(1))), submit(client, jsonl(documents(1)))
    fake.advance(1000)
    assert client.batches.retrieve(first.id).status == "completed"
    assert client.batches.retrieve(second.id).status == "in_progress"
    assert [(batch["number"], batch["status"], batch["polls"]) for batch in fake.batches()] == [
        (0, "completed", 1),
        (1, "in_progress", 1),
    ]


def test_the_output_file_is_spoiled(fake: FakeOpenAI) -> None:
    raw = jsonl(documents(3))
    whole = content(fake, finished(fake, raw).output_file_id)
    assert len(whole.splitlines()) == 3
    spoiled = {}
    for kind in ("bom", "blank_lines", "half_last_line", "junk_line", "unknown_ids"):
        strike(fake, kind)
        spoiled[kind] = content(fake, finished(fake, raw).output_file_id)
    assert spoiled["bom"].startswith(b"\xef\xbb\xbf{")
    assert b"\n\n\r\n  \n" in spoiled["blank_lines"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(spoiled["half_last_line"].splitlines()[-1])
    assert spoiled["junk_line"].endswith(b"<html>oops</html>\n")
    assert ids(lines_of(spoiled["unknown_ids"])) == ["doc-0", "doc-1", "doc-2", "unknown-0"]


# Lines


def test_some_lines_fail_and_are_not_billed(fake: FakeOpenAI) -> None:
    fake.configure(
        faults=[
            {"kind": "line_status", "status": 429, "when": {"custom_ids": ["doc-1"]}},
            {"kind": "line_status", "status": 500, "when": {"indexes": [3]}, "file": "output"},
            {"kind": "line_error", "when": {"text": "text 3"}},
            {"kind": "line_status", "when": {"batches": [1]}},
        ]
    )
    done = finished(fake, jsonl(documents(6)))
    output, errors = results(fake, done)
    assert (ids(output), ids(errors)) == (["doc-0", "doc-2", "doc-4", "doc-5"], ["doc-1", "doc-3"])
    by_id = {line["custom_id"]: line for line in output + errors}
    assert by_id["doc-1"]["response"]["status_code"] == 429
    assert by_id["doc-1"]["response"]["body"]["error"]["code"] == "rate_limit_exceeded"
    assert by_id["doc-2"]["response"]["status_code"] == 500
    assert (by_id["doc-3"]["response"], by_id["doc-3"]["error"]["code"]) == (None, "request_timeout")
    assert {key for key, counts in fake.lines().items() if counts["billed"]} == {"doc-0", "doc-4", "doc-5"}


def test_lines_are_missing_doubled_and_unknown(fake: FakeOpenAI) -> None:
    fake.configure(
        faults=[
            {"kind": "missing", "when": {"indexes": [1]}},
            {"kind": "duplicate", "when": {"indexes": [2]}, "content": "second"},
            {"kind": "duplicate", "when": {"indexes": [3]}, "file": "errors"},
            {"kind": "null_custom_id", "when": {"indexes": [4]}},
            {"kind": "junk", "when": {"indexes": [5]}, "text": "???"},
        ]
    )
    bodies = documents(6)
    done = finished(fake, jsonl(bodies))
    raw = content(fake, done.output_file_id)
    assert raw.count(b"???\n") == 1
    output = lines_of(raw.replace(b"???\n", b""))
    assert sorted(str(line["custom_id"]) for line in output) == ["None", "doc-1", "doc-1", "doc-2", "doc-5"]
    assert {text_of(line) for line in output if line["custom_id"] == "doc-1"} == {
        expected_content(bodies["doc-1"]),
        "second",
    }
    assert ids(results_of_errors(fake, done.error_file_id)) == ["doc-2"]
    assert fake.stats()["lines_billed"] == 6


def results_of_errors(fake: FakeOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return lines_of(content(fake, file_id))


@pytest.mark.parametrize(
    ("fault", "finish", "said"),
    [
        ({"kind": "content", "content": "{}"}, "stop", "{}"),
        ({"kind": "refusal"}, "stop", None),
        ({"kind": "length"}, "length", "Answer 10a5ce32 "),
        ({"kind": "content_filter"}, "content_filter", None),
    ],
)
def test_an_answer_is_no_use(fake: FakeOpenAI, fault: Any, finish: str, said: str | None) -> None:
    fake.configure(faults=[fault])
    ((line,), _) = results(fake, finished(fake, jsonl(documents(1))))
    choice = line["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == finish
    assert said is None or choice["message"]["content"].startswith(said[:7])
    assert (choice["message"]["content"] is None) == (said is None)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("null_body", ["response", "body"]),
        ("null_both", ["response"]),
        ("null_both", ["error"]),
        ("no_usage", ["response", "body", "usage"]),
        ("no_choices", ["response", "body", "choices"]),
    ],
)
def test_parts_of_a_line_are_null(fake: FakeOpenAI, kind: str, path: list[str]) -> None:
    strike(fake, kind)
    ((line,), _) = results(fake, finished(fake, jsonl(documents(1))))
    value: Any = line
    for name in path:
        value = value[name]
    assert not value


# Size


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_fifty_thousand_lines_stream_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("wb") as sink:
        for start in range(0, 50_000, 1000):
            bodies = {f"doc-{number}": _big_body(number) for number in range(start, start + 1000)}
            sink.write(jsonl(bodies))
    assert path.stat().st_size > 100_000_000
    with FakeOpenAI(record=False) as fake, client_of(fake, timeout=120.0) as client:
        before = _peak_mb(fake.pid)
        with path.open("rb") as opened:
            file_id = client.files.create(file=("big.jsonl", opened), purpose="batch").id
        batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        fake.advance(1000)
        done = client.batches.retrieve(batch.id)
        assert done.status == "completed"
        assert done.output_file_id is not None
        count = 0
        with client.files.with_streaming_response.content(done.output_file_id) as response:
            for _ in response.iter_lines():
                count += 1
        assert count == 50_000
        assert fake.stats()["lines_billed"] == 50_000
        peak_mb = _peak_mb(fake.pid) - before
        assert peak_mb < 80, "less than the file of 100 MB"


def _big_body(number: int) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"{number} " + "word " * 400}]}


def _peak_mb(pid: int) -> float:
    """Most memory that the process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
