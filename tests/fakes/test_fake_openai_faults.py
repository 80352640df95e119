"""The faults of the fake OpenAI that strike requests, as the official client sees them."""

import subprocess
import sys
import time

import openai
import pytest

from tests.fakes.fake_openai import FakeOpenAI
from tests.fakes.fake_openai_client import CHAT, client_of, content, documents, finished, jsonl, strike, submit, upload

# Requests


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("rate_limit_429", openai.RateLimitError, "rate_limit_exceeded"),
        ("insufficient_quota_429", openai.RateLimitError, "insufficient_quota"),
        ("server_error_500", openai.InternalServerError, None),
        ("overloaded_503", openai.InternalServerError, None),
        ("bad_gateway_502", openai.InternalServerError, None),
        ("unauthorized_401", openai.AuthenticationError, "invalid_api_key"),
        ("forbidden_403", openai.PermissionDeniedError, "unsupported_country_region_territory"),
        ("not_found_404", openai.NotFoundError, None),
        ("conflict_409", openai.ConflictError, "conflict"),
        ("bad_request_400", openai.BadRequestError, "invalid_value"),
        ("close", openai.APIConnectionError, None),
        ("reset", openai.APIConnectionError, None),
        ("garbage", openai.APIConnectionError, None),
    ],
)
def test_a_request_fails_on_arrival_and_has_done_nothing(
    fake: FakeOpenAI, client: openai.OpenAI, kind: str, error: type[openai.APIError], code: str | None
) -> None:
    file_id = upload(client, jsonl(documents(1)))
    strike(fake, kind, when={"route": "batches.create"}, times=1)
    with pytest.raises(error) as caught:
        client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    assert caught.value.code == code
    assert fake.stats()["batches_created"] == 0
    assert fake.stats()[f"faults:{kind}"] == 1
    client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")


def test_how_long_to_wait_is_told(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    strike(fake, "rate_limit_429", retry_after=7)
    with pytest.raises(openai.RateLimitError) as caught:
        client.models.list()
    assert caught.value.response.headers["retry-after"] == "7"
    strike(fake, "status", status=418, body={"error": {"message": "teapot", "code": "tea"}}, headers={"x-a": "b"})
    with pytest.raises(openai.APIStatusError) as other:
        client.models.list()
    assert (other.value.status_code, other.value.code, other.value.response.headers["x-a"]) == (418, "tea", "b")


def test_the_client_itself_waits_and_comes_back(fake: FakeOpenAI) -> None:
    strike(fake, "rate_limit_429", retry_after_ms=1, when={"indexes": [0, 1]})
    with client_of(fake, max_retries=2) as client:
        assert client.models.list().data
    assert [record["outcome"] for record in fake.requests()] == [429, 429, 200]
    assert [record["retry_count"] for record in fake.requests()] == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["close", "reset", "hang"])
def test_a_batch_is_created_but_nobody_is_told(fake: FakeOpenAI, how: str) -> None:
    with client_of(fake, timeout=2.0) as client:
        file_id = upload(client, jsonl(documents(1)))
        strike(fake, "answer_lost", when={"route": "batches.create"}, times=1, how=how)
        with pytest.raises(openai.APIConnectionError):
            client.batches.create(
                input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"shard": "3"}
            )
        assert [batch.metadata for batch in client.batches.list()] == [{"shard": "3"}], "it can be adopted"


def test_the_clients_own_repetition_makes_a_second_batch(fake: FakeOpenAI) -> None:
    """A lost answer makes the client create the batch twice, so create calls need max_retries=0."""
    strike(fake, "answer_lost", when={"route": "batches.create"}, times=1)
    with client_of(fake, max_retries=2) as client:
        submit(client, jsonl(documents(1)))
    assert fake.stats()["batches_created"] == 2
    fake.advance(1000)
    assert fake.lines() == {"doc-0": {"submitted": 2, "billed": 2}}
    assert fake.stats()["max_billed_per_line"] == fake.stats()["max_billed_per_body"] == 2


def test_the_answer_to_an_upload_is_lost(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    strike(fake, "answer_lost", when={"route": "files.create"}, times=1)
    with pytest.raises(openai.APIConnectionError):
        upload(client, jsonl(documents(1)))
    assert [file.filename for file in client.files.list()] == ["input.jsonl"]


def test_a_client_that_dies_waiting_leaves_its_batch_behind(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    file_id = upload(client, jsonl(documents(1)))
    strike(fake, "answer_lost", how="hang", when={"route": "batches.create"}, times=1)
    script = (
        "import openai, sys; openai.OpenAI(base_url=sys.argv[1], api_key='x', max_retries=0).batches.create("
        "input_file_id=sys.argv[2], endpoint='/v1/chat/completions', completion_window='24h')"
    )
    with subprocess.Popen([sys.executable, "-c", script, fake.url, file_id]) as process:
        fake.wait_for("answers_lost", 1, timeout_s=20)
        process.kill()
    fake.wait_for("in_flight", equals=0)
    assert len(client.batches.list().data) == 1


def test_hanging_and_slow_requests_end_in_a_time_out(fake: FakeOpenAI) -> None:
    with client_of(fake, timeout=0.3) as client:
        strike(fake, "hang", times=1)
        with pytest.raises(openai.APITimeoutError):
            client.models.list()
        strike(fake, "delay", delay_s=2)
        with pytest.raises(openai.APITimeoutError):
            client.models.list()
    fake.wait_for("in_flight", equals=0)


def test_downloads_are_cut(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    done = finished(fake, jsonl(documents(50)))
    whole = content(fake, done.output_file_id)
    for kind in ("truncated", "reset_after"):
        strike(fake, kind, bytes=1000, when={"route": "files.content"}, times=1)
        with pytest.raises(openai.APIConnectionError):
            content(fake, done.output_file_id)
        assert content(fake, done.output_file_id) == whole
    strike(fake, "cut", bytes=1000, when={"route": "files.content"}, times=1)
    assert content(fake, done.output_file_id) == whole[:1000], "nothing but the last line tells"


def test_downloads_are_slow(fake: FakeOpenAI) -> None:
    done = finished(fake, jsonl(documents(4)))
    size = len(content(fake, done.output_file_id))
    strike(fake, "slow", bytes_per_s=size * 2, when={"route": "files.content"})
    started = time.monotonic()
    content(fake, done.output_file_id)
    assert time.monotonic() - started > 0.4


def test_html_instead_of_json(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    strike(fake, "not_json", when={"route": "batches.list"})
    raw = client.batches.with_raw_response.list()
    assert (raw.http_response.status_code, raw.http_response.text[:6]) == (200, "<html>")


def test_faults_are_aimed(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(
        faults=[
            {"kind": "not_found_404", "when": {"route": ["files.retrieve", "files.content"], "indexes": [0]}},
            {"kind": "conflict_409", "when": {"route": "batches.*", "text": "limit=7"}},
            {"kind": "overloaded_503", "when": {"route": "models.list", "probability": 0.5, "seed": 3}},
        ]
    )
    file_id = upload(client, jsonl(documents(1)))
    with pytest.raises(openai.NotFoundError, match="not visible yet"):
        client.files.retrieve(file_id)
    assert client.files.retrieve(file_id).id == file_id
    assert client.batches.list(limit=6).data == []
    with pytest.raises(openai.ConflictError):
        client.batches.list(limit=7)
    for _ in range(40):
        try:
            client.models.list()
        except openai.InternalServerError:
            continue
    assert 10 < fake.stats()["faults:overloaded_503"] < 30
