"""Which request a fault strikes."""

from tests.fakes.fake_ollama import FakeOllama, probability_hit
from tests.fakes.fake_ollama_client import chat, post, strike


def statuses(ollama: FakeOllama, texts: list[str]) -> list[int]:
    return [chat(ollama, text).status for text in texts]


def test_conditions(ollama: FakeOllama) -> None:
    texts = [f"text {number}" for number in range(6)]
    strike(ollama, "busy_503", when={"indexes": [1, 4]})
    assert statuses(ollama, texts) == [200, 503, 200, 200, 503, 200]
    strike(ollama, "busy_503", when={"from": 8, "to": 9})
    assert statuses(ollama, texts) == [200, 200, 503, 503, 200, 200]
    strike(ollama, "busy_503", when={"text": "text 3"})
    assert statuses(ollama, texts) == [200, 200, 200, 503, 200, 200]
    with_example = [{"role": "user", "content": "a longer example"}, {"role": "user", "content": "text 3"}]
    assert chat(ollama, messages=with_example).status == 503
    strike(ollama, "busy_503", when={"text": "text 3"}, times=1)
    assert statuses(ollama, texts * 2).count(503) == 1
    ollama.configure(faults=[{"kind": "busy_503", "times": 2}, {"kind": "runner_stopped_500", "times": 1}])
    assert statuses(ollama, texts) == [503, 503, 500, 200, 200, 200]


def test_probability_is_reproducible(ollama: FakeOllama) -> None:
    texts = [f"text {number}" for number in range(60)]
    strike(ollama, "busy_503", when={"probability": 0.3, "seed": 4})
    assert statuses(ollama, texts) == [503 if probability_hit(4, index, 0.3) else 200 for index in range(60)]
    strike(ollama, "busy_503", when={"probability": 0.3, "seed": 4, "by": "text"})
    wanted = [503 if probability_hit(4, text, 0.3) else 200 for text in texts]
    assert statuses(ollama, texts) == wanted == statuses(ollama, texts)
    assert 5 < wanted.count(503) < 35


def test_other_routes_are_left_alone_unless_named(ollama: FakeOllama) -> None:
    strike(ollama, "busy_503")
    request = {"model": "nomic-embed-text", "input": "x"}
    assert post(ollama, "/api/embed", request).status == 200
    assert post(ollama, "/api/generate", {"model": "llama3.2", "prompt": "x"}).status == 503
    strike(ollama, "busy_503", when={"path": "/api/chat"})
    assert post(ollama, "/api/generate", {"model": "llama3.2", "prompt": "x"}).status == 200
