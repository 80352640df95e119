"""Which request a fault strikes."""

from collections.abc import Iterator

import pytest

from tests.fakes.fake_ollama import FakeOllama, probability_hit
from tests.fakes.fake_ollama_client import chat, post, strike


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake
        assert fake.stats()["internal_errors"] == 0


@pytest.fixture
def fake(running: FakeOllama) -> FakeOllama:
    running.reset()
    return running


def statuses(fake: FakeOllama, texts: list[str]) -> list[int]:
    return [chat(fake, text).status for text in texts]


def test_conditions(fake: FakeOllama) -> None:
    texts = [f"text {number}" for number in range(6)]
    strike(fake, "busy_503", when={"indexes": [1, 4]})
    assert statuses(fake, texts) == [200, 503, 200, 200, 503, 200]
    strike(fake, "busy_503", when={"from": 8, "to": 9})
    assert statuses(fake, texts) == [200, 200, 503, 503, 200, 200]
    strike(fake, "busy_503", when={"text": "text 3"})
    assert statuses(fake, texts) == [200, 200, 200, 503, 200, 200]
    with_example = [{"role": "user", "content": "a longer example"}, {"role": "user", "content": "text 3"}]
    assert chat(fake, messages=with_example).status == 503
    strike(fake, "busy_503", when={"text": "text 3"}, times=1)
    assert statuses(fake, texts * 2).count(503) == 1
    fake.configure(faults=[{"kind": "busy_503", "times": 2}, {"kind": "runner_stopped_500", "times": 1}])
    assert statuses(fake, texts) == [503, 503, 500, 200, 200, 200]


def test_probability_is_reproducible(fake: FakeOllama) -> None:
    texts = [f"text {number}" for number in range(60)]
    strike(fake, "busy_503", when={"probability": 0.3, "seed": 4})
    assert statuses(fake, texts) == [503 if probability_hit(4, index, 0.3) else 200 for index in range(60)]
    strike(fake, "busy_503", when={"probability": 0.3, "seed": 4, "by": "text"})
    wanted = [503 if probability_hit(4, text, 0.3) else 200 for text in texts]
    assert statuses(fake, texts) == wanted == statuses(fake, texts)
    assert 5 < wanted.count(503) < 35


def test_other_routes_are_left_alone_unless_named(fake: FakeOllama) -> None:
    strike(fake, "busy_503")
    request = {"model": "nomic-embed-text", "input": "x"}
    assert post(fake, "/api/embed", request).status == 200
    assert post(fake, "/api/generate", {"model": "llama3.2", "prompt": "x"}).status == 503
    strike(fake, "busy_503", when={"path": "/api/chat"})
    assert post(fake, "/api/generate", {"model": "llama3.2", "prompt": "x"}).status == 200
