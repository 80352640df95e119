"""Embeddings of the fake OpenAI: limits, slots, counts and wrong answers."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import openai
import pytest

from tests.fakes.fake_openai import FakeOpenAI, estimate_tokens, expected_embedding
from tests.fakes.fake_openai_client import client_of, finished, jsonl, results

_MODEL = "text-embedding-3-small"


@pytest.fixture
def fake(fake: FakeOpenAI) -> FakeOpenAI:
    fake.configure(dimensions=8)
    return fake


def vectors(client: openai.OpenAI, texts: Any, **fields: Any) -> list[list[float]]:
    """Vectors in the order of the answer."""
    return [item.embedding for item in client.embeddings.create(model=_MODEL, input=texts, **fields).data]


def test_vectors_are_unit_vectors_of_their_text(client: openai.OpenAI) -> None:
    for vector in vectors(client, ["a", "b c", "d e f", "ä ö"]):
        assert math.sqrt(sum(value * value for value in vector)) == pytest.approx(1.0, abs=1e-6)
    (near, far), (base,) = (vectors(client, texts) for texts in (["lost my red card", "go"], ["my red card"]))
    assert sum(map(float.__mul__, near, base)) > sum(map(float.__mul__, far, base))


@pytest.mark.parametrize("texts", ["one", ["one", "two"], [1, 2, 3], [[1, 2], [3]]])
def test_every_form_of_input(client: openai.OpenAI, texts: Any) -> None:
    count = 1 if texts in ("one", [1, 2, 3]) else 2
    assert len(vectors(client, texts)) == count


@pytest.mark.parametrize(
    ("texts", "code", "message"),
    [
        (["x"] * 2049, None, "'\\$.input' is invalid"),
        (["x", ""], None, "'\\$.input' is invalid"),
        ("", None, "'\\$.input' is invalid"),
        ([], None, "'\\$.input' is invalid"),
        (["x" * 4 * 8193], None, "maximum context length is 8192 tokens, however you requested 8193"),
        (["x" * 4000] * 301, "max_tokens_per_request", "Requested 301000 tokens, max 300000 tokens per request"),
    ],
)
def test_the_limits_hold(fake: FakeOpenAI, client: openai.OpenAI, texts: Any, code: str | None, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        vectors(client, texts)
    assert caught.value.code == code
    assert fake.embedded() == {}


def test_what_is_just_within_the_limits_passes(client: openai.OpenAI) -> None:
    assert len(vectors(client, ["x"] * 2048)) == 2048
    assert len(vectors(client, ["x" * 4 * 8192])) == 1
    assert len(vectors(client, ["x" * 4000] * 300)) == 300


def test_dimensions(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    assert [len(vector) for vector in vectors(client, ["a"], dimensions=3)] == [3]
    with pytest.raises(openai.BadRequestError, match="between 1 and 8"):
        vectors(client, ["a"], dimensions=9)
    fake.configure(dimensions=None)
    with pytest.raises(openai.BadRequestError, match="does not support specifying dimensions"):
        client.embeddings.create(model="text-embedding-ada-002", input="a", dimensions=4)


def test_inputs_are_counted_by_text(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    vectors(client, ["a", "b"])
    fake.configure(faults=[{"kind": "answer_lost", "times": 1}, {"kind": "server_error_500"}])
    with pytest.raises(openai.APIConnectionError):
        vectors(client, ["b"])
    with pytest.raises(openai.InternalServerError):
        vectors(client, ["b"])
    assert fake.embedded() == {
        sha256(b"a").hexdigest(): {"submitted": 1, "billed": 1},
        sha256(b"b").hexdigest(): {"submitted": 2, "billed": 2},
    }
    assert fake.stats()["max_billed_per_embedding"] == 2
    usage = client_usage(fake, ["abcde", "f"])
    assert usage == estimate_tokens("abcde") + estimate_tokens("f") == 3


def client_usage(fake: FakeOpenAI, texts: list[str]) -> int:
    fake.configure(faults=[])
    with client_of(fake) as client:
        return client.embeddings.create(model=_MODEL, input=texts).usage.total_tokens


def test_one_input_fails_every_call_that_holds_it(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(faults=[{"kind": "bad_request_400", "when": {"route": "embeddings.create", "text": "POISON"}}])
    with pytest.raises(openai.BadRequestError):
        vectors(client, ["x" * 200_0, *["y" * 400] * 200, "my POISON"])
    assert len(vectors(client, ["a", "b"])) == 2


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_wrong_answers(fake: FakeOpenAI, client: openai.OpenAI, encoding: Any) -> None:
    texts, kinds = ["a", "b", "c"], ("short", "extra", "dims", "zero", "nan", "unordered", "same_index")
    right = {text: pytest.approx(expected_embedding(text, 8), abs=1e-6) for text in texts}
    got: dict[str, Any] = {}
    for kind in kinds:
        fake.configure(faults=[{"kind": f"embed_{kind}"}])
        raw = client.embeddings.with_raw_response.create(model=_MODEL, input=texts, encoding_format=encoding)
        got[kind] = raw.http_response.text
        fake.configure(faults=[{"kind": f"embed_{kind}", "item": 1 if kind in ("dims", "zero", "nan") else -1}])
        if kind != "nan" or encoding == "base64":
            data = client.embeddings.create(model=_MODEL, input=texts)
            got[kind] = [(item.index, item.embedding) for item in data.data]
    assert [index for index, _ in got["short"]] == [0, 1]
    assert [index for index, _ in got["extra"]] == [0, 1, 2, 3]
    assert [len(vector) for _, vector in got["dims"]] == [8, 7, 8]
    assert got["zero"][1] == (1, [0.0] * 8)
    assert [index for index, _ in got["unordered"]] == [2, 1, 0]
    assert got["unordered"][0][1] == right["c"]
    assert [index for index, _ in got["same_index"]] == [0, 0, 0]
    if encoding == "float":
        assert "NaN" in got["nan"]
    else:
        assert math.isnan(got["nan"][1][1][0])


def test_slots_bound_what_runs_at_once_and_latency_adds_up(fake: FakeOpenAI) -> None:
    fake.configure(slots=2, latency_s=0.1)
    with client_of(fake) as client, ThreadPoolExecutor(6) as pool:
        started = time.monotonic()
        list(pool.map(lambda number: vectors(client, [str(number)]), range(6)))
        assert time.monotonic() - started >= 0.3
    stats = fake.stats()
    assert stats["max_sync_in_flight"] == 2
    assert stats["max_in_flight"] > 2


def test_a_request_can_be_waited_for(fake: FakeOpenAI) -> None:
    fake.configure(latency_s=0.5)
    with client_of(fake) as client:
        thread = threading.Thread(target=vectors, args=(client, ["a"]))
        thread.start()
        fake.wait_for("sync_in_flight", 1)
        fake.wait_for("sync_in_flight", equals=0)
        thread.join()


def test_embeddings_in_a_batch(fake: FakeOpenAI) -> None:
    body = {"model": _MODEL, "input": ["a", "b"], "dimensions": 4}
    done = finished(fake, jsonl({"x": body}, "/v1/embeddings"), endpoint="/v1/embeddings")
    ((line,), _) = results(fake, done)
    data = line["response"]["body"]["data"]
    assert [item["embedding"] for item in data] == [pytest.approx(expected_embedding(text, 4)) for text in "ab"]
