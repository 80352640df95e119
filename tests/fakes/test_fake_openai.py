"""The fake OpenAI as the official client sees it: files, the life of batches, validation, and the process."""

import asyncio
from typing import Any

import openai
import pytest

from tests.fakes.fake_openai import FakeOpenAI, expected_content
from tests.fakes.fake_openai_client import (
    A_DAY_S,
    CHAT,
    chat_body,
    documents,
    finished,
    ids,
    jsonl,
    results,
    submit,
    text_of,
    upload,
)

# The life of a batch


def test_a_batch_from_upload_to_answers(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    bodies = documents(30)
    batch = submit(client, jsonl(bodies), metadata={"run": "r1", "shard": "0"})
    assert (batch.status, batch.metadata) == ("validating", {"run": "r1", "shard": "0"})
    seen = []
    for seconds in (10, 290, 310, 20):
        fake.advance(seconds)
        seen.append(client.batches.retrieve(batch.id))
    assert [one.status for one in seen] == ["in_progress", "in_progress", "finalizing", "completed"]
    assert seen[1].request_counts is not None
    assert 0 < seen[1].request_counts.completed < 30
    assert seen[2].output_file_id is None
    done = seen[3]
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 30, "completed": 30, "failed": 0}
    assert done.error_file_id is None
    output, _ = results(fake, done)
    assert {line["custom_id"]: text_of(line) for line in output} == {
        key: expected_content(body) for key, body in bodies.items()
    }
    assert [line["custom_id"] for line in output] != list(bodies), "the order must not be that of the input"
    assert done.usage is not None
    assert done.usage.input_tokens == sum(line["response"]["body"]["usage"]["prompt_tokens"] for line in output)
    assert fake.lines() == {key: {"submitted": 1, "billed": 1} for key in bodies}


def test_polls_can_move_a_batch_to_its_end(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(polls_until_done=3)
    batch = submit(client, jsonl(documents(2)))
    assert [client.batches.retrieve(batch.id).status for _ in range(3)] == ["in_progress", "in_progress", "completed"]


def test_real_time_moves_it_where_wanted(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(time_scale=1e6)
    batch = submit(client, jsonl(documents(2)))
    for _ in range(10_000):
        status = client.batches.retrieve(batch.id).status
        if status == "completed":
            break
    assert status == "completed"


def test_a_cancelled_batch_keeps_what_had_run(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    batch = submit(client, jsonl(documents(10)))
    fake.advance(5 + 300)
    assert client.batches.cancel(batch.id).status == "cancelling"
    fake.advance(60)
    done = client.batches.retrieve(batch.id)
    assert done.status == "cancelled"
    output, errors = results(fake, done)
    assert (len(output), len(errors)) == (5, 5)
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert {line["response"] for line in errors} == {None}
    with pytest.raises(openai.ConflictError, match="Cannot cancel"):
        client.batches.cancel(batch.id)


def test_a_batch_that_takes_longer_than_a_day_expires_with_what_had_run(fake: FakeOpenAI) -> None:
    fake.configure(run_s=4 * A_DAY_S, validate_s=0)
    done = finished(fake, jsonl(documents(8)), seconds=A_DAY_S)
    output, errors = results(fake, done)
    assert (done.status, len(output), len(errors)) == ("expired", 2, 6)
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    assert fake.stats()["lines_billed"] == 2


def test_batches_are_listed_newest_first_in_pages(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    created = [submit(client, jsonl(documents(1)), metadata={"n": str(number)}).id for number in range(5)]
    page = client.batches.list(limit=2)
    assert ([one.id for one in page.data], page.has_more) == (created[:2:-1], True)
    assert [one.id for one in client.batches.list(limit=2)] == created[::-1], "following the pages"
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.batches.list(limit=101)


def test_lists_can_lag_behind(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(list_lag=2)
    batch = submit(client, jsonl(documents(1)))
    assert [len(client.batches.list().data) for _ in range(3)] == [0, 0, 1]
    assert client.batches.retrieve(batch.id).id == batch.id
    assert [len(client.files.list().data) for _ in range(3)] == [0, 0, 1]


def test_the_asynchronous_client_gets_the_same(fake: FakeOpenAI) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=fake.url, api_key="sk-x", max_retries=0) as client:
            file = await client.files.create(file=("a.jsonl", jsonl(documents(3))), purpose="batch")
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            await asyncio.to_thread(fake.advance, 1000)
            return (await client.batches.retrieve(batch.id)).status

    assert asyncio.run(run()) == "completed"


# Files


def test_files_are_kept_listed_and_deleted(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    raw = jsonl(documents(3))
    file = client.files.create(
        file=("mine.jsonl", raw), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.bytes, file.filename, file.purpose) == (len(raw), "mine.jsonl", "batch")
    assert file.expires_at == file.created_at + 3600
    other = upload(client, raw, purpose="user_data")
    assert [one.id for one in client.files.list(purpose="batch")] == [file.id]
    assert client.files.content(file.id).read() == raw
    assert fake.path_of(file.id).read_bytes() == raw
    assert client.files.delete(other).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(other)
    fake.advance(3601)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_output_files_go_when_they_are_told_to(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    done = finished(
        fake, jsonl(documents(1)), output_expires_after={"anchor": "created_at", "seconds": 3600}, seconds=1000
    )
    assert done.output_file_id is not None
    assert client.files.retrieve(done.output_file_id).filename == f"{done.id}_output.jsonl"
    fake.advance(3600)
    with pytest.raises(openai.NotFoundError):
        client.files.content(done.output_file_id)


@pytest.mark.parametrize(
    ("name", "purpose", "message"),
    [("a.txt", "batch", "Must be .jsonl"), ("a.jsonl", "poetry", "Supported values")],
)
def test_uploads_are_checked(client: openai.OpenAI, name: str, purpose: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.files.create(file=(name, b"{}"), purpose=purpose)
    assert client.files.list().data == []


# What a create call and the check of the file refuse


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"endpoint": "/v1/poems"}, "invalid_value"),
        ({"completion_window": "1h"}, "invalid_value"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "object_above_max_properties"),
        ({"metadata": {"a": "x" * 513}}, "string_above_max_length"),
        ({"metadata": {"a": 1}}, "invalid_type"),
    ],
)
def test_create_calls_are_checked(client: openai.OpenAI, fields: Any, code: str) -> None:
    request: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"} | fields
    file_id = upload(client, jsonl(documents(1)))
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(input_file_id=file_id, **request)
    assert caught.value.code == code
    assert client.batches.list().data == []


def test_unknown_ids_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="file-none"):
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError):
        client.batches.cancel("batch_none")


_ONE = jsonl(documents(1))


@pytest.mark.parametrize(
    ("raw", "code", "line"),
    [
        (b"", "empty_file", None),
        (_ONE + b"{half\n", "invalid_json_line", 2),
        (_ONE + b"\n", "invalid_json_line", 2),
        (_ONE + _ONE, "duplicate_custom_id", 2),
        (jsonl(documents(1), "/v1/embeddings"), "url_mismatch", 1),
        (_ONE + jsonl({"b": chat_body("x", model="gpt-4o")}), "model_mismatch", 2),
        (_ONE.replace(b"custom_id", b"my_id"), "missing_required_parameter", 1),
        (_ONE.replace(b"POST", b"GET"), "invalid_method", 1),
        (jsonl({"a": chat_body("x", model="gpt-none")}), "model_not_found", 1),
        (jsonl(documents(6)), "too_many_tasks", None),
        (jsonl({"a": chat_body("x" * 2000)}), "invalid_request", None),
    ],
)
def test_a_bad_file_fails_its_batch_and_runs_nothing(fake: FakeOpenAI, raw: bytes, code: str, line: int | None) -> None:
    fake.configure(models=["gpt-4o-mini", "gpt-4o"], max_lines=5, max_file_bytes=1500)
    done = finished(fake, raw, seconds=5)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert (done.errors.data[0].code, done.errors.data[0].line) == (code, line)
    assert (done.output_file_id, done.error_file_id) == (None, None)
    assert fake.stats()["lines_billed"] == fake.stats()["lines_submitted"] == 0


def test_a_file_of_another_purpose_fails_its_batch(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    file_id = upload(client, _ONE, purpose="user_data")
    batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    fake.advance(5)
    errors = client.batches.retrieve(batch.id).errors
    assert errors is not None
    assert errors.data is not None
    assert "purpose" in (errors.data[0].message or "")


def test_embedding_inputs_count_over_the_whole_file(fake: FakeOpenAI) -> None:
    fake.configure(max_embedding_inputs=3)
    body = {"model": "text-embedding-3-small", "input": ["a", "b"]}
    done = finished(fake, jsonl({"a": body, "b": body}, "/v1/embeddings"), endpoint="/v1/embeddings")
    assert done.status == "failed"


def test_the_token_limit_counts_all_live_batches_and_is_free_again_later(
    fake: FakeOpenAI, client: openai.OpenAI
) -> None:
    raw = jsonl({"a": chat_body("x" * 400)})
    fake.configure(enqueued_token_limit=150)
    first = submit(client, raw)
    fake.advance(10)
    second = submit(client, raw)
    fake.advance(10)
    failed = client.batches.retrieve(second.id)
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert failed.errors.data[0].code == "token_limit_exceeded"
    assert "Limit: 150 enqueued tokens" in (failed.errors.data[0].message or "")
    fake.advance(1000)
    assert client.batches.retrieve(first.id).status == "completed"
    assert finished(fake, raw).status == "completed"


def test_a_line_that_the_api_would_refuse_fails_alone(fake: FakeOpenAI) -> None:
    bodies = documents(2) | {"bad": {"model": "gpt-4o-mini"}, "long": chat_body("x" * 600_000)}
    done = finished(fake, jsonl(bodies))
    output, errors = results(fake, done)
    assert (ids(output), ids(errors)) == (["doc-0", "doc-1"], ["bad", "long"])
    codes = {line["custom_id"]: line["response"]["body"]["error"]["code"] for line in errors}
    assert codes == {"bad": "missing_required_parameter", "long": "context_length_exceeded"}
