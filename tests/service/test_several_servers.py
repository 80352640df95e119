"""The service with two model servers: one may go away, and each is a series of its own."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import serve


def test_service_goes_on_with_the_server_that_is_left(model: FakeOllama, tmp_path: Path) -> None:
    """No caller notices that one is killed; without any, they get 503 at once."""
    model.configure(latency_s=0.1)  # so that the second one is asked first
    with FakeOllama() as second:
        address = f"{model.url},{second.url}"
        with serve(tmp_path, OLLAMA_ENDPOINT=address, OLLAMA_MODEL="llama3.2", LLM_MAX_ATTEMPTS="1") as service:
            assert [service.classify().status for _ in range(4)] == [200] * 4
            assert 1 <= second.stats()["chat_requests"] <= 3
            names = [f"127.0.0.1:{one.port}" for one in (model, second)]
            assert [service.metric(f'triad_server_ready{{server="{name}"}}') for name in names] == [1.0, 1.0]
            second.kill()
            assert [service.classify().status for _ in range(4)] == [200] * 4
            assert [service.metric(f'triad_server_ready{{server="{name}"}}') for name in names] == [1.0, 0.0]
            assert service.get("/ready").status == 200
            model.kill()
            assert service.classify().error == "ModelUnavailableError"
            model.start()
            service.wait_for_metric(f'triad_server_ready{{server="{names[0]}"}}', 1.0)
            assert service.classify().status == 200
