"""The model is loaded once, alone, before concurrency opens; worker and service never make each other load it again."""

from __future__ import annotations

import concurrent.futures
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import Answer, ServiceProcess, conversation, serve
from tests.worker.long_conversations import SENTENCE, check_labels_are_of_what_was_sent, long_conversation
from tests.worker.site import ROOT, Site, WorkerProcess, model_of
from tests.worker.site import conversation as document


def serve_beside(site: Site, folder: Path, **settings: str) -> AbstractContextManager[ServiceProcess]:
    """Run the service on the model server of *site*."""
    return serve(folder, OLLAMA_ENDPOINT=model_of(site).url, OLLAMA_MODEL="llama3.2", **settings)


def test_load_may_take_longer_than_a_call(site: Site) -> None:
    """There is one load, it is not aborted, and no call precedes its end; the console shows it."""
    documents = [document(number) for number in range(30)]
    site.source.insert_many(documents)
    model_of(site).configure(load_delay_s=3.0)
    ended = site.run(LLM_TIMEOUT_S="1")
    assert ended.code == 0, ended.err
    assert "loading llama3.2 with 4096 tokens" in ended.err
    stats = model_of(site).stats()
    assert (stats["loads"], stats["load_aborts"], stats["load_requests"]) == (1, 0, 1)
    assert (stats["chat_requests"], stats["failed"]) == (30, 0)


def test_model_that_does_not_load_ends_the_run(site: Site) -> None:
    """One message and exit code 3; nothing but the agreement on the window was stored."""
    site.source.insert_one(document(1))
    model_of(site).configure(load_error="llama-server process has terminated: exit status 1")
    ended = site.run()
    assert ended.code == 3, ended.err
    assert sorted(site.database.list_collection_names()) == ["conversation_set", "model_windows"]
    assert model_of(site).stats()["chat_requests"] == 0


@pytest.mark.thorough
def test_worker_service_and_worker_load_the_model_once(site: Site, tmp_path: Path) -> None:
    """Each reuses the loaded window, because it is large enough."""
    site.source.insert_many([document(number) for number in range(10)])
    assert site.run().code == 0
    with serve_beside(site, tmp_path) as service:
        assert service.classify().status == 200
        site.source.insert_many([document(number) for number in range(10, 20)])
        assert site.run().code == 0
        assert service.classify(conversation("another one")).status == 200
    stats = model_of(site).stats()
    assert (stats["loads"], stats["reloads"]) == (1, 0)
    assert {record["options"]["num_ctx"] for record in model_of(site).requests()} == {4096}


@pytest.mark.thorough
def test_worker_reuses_the_larger_window_of_the_service(site: Site, tmp_path: Path) -> None:
    """It keeps the 8192 tokens of the service; a worker that needs more reloads the model and reports it."""
    site.source.insert_many([document(number) for number in range(10)])
    with serve_beside(site, tmp_path) as service:
        assert service.classify().status == 200
        ended = site.run()
        assert "is already loaded with a window of 8192 tokens; using that" in ended.err
        assert model_of(site).stats()["loads"] == 1
        site.source.insert_many([long_conversation(number, 200) for number in range(100, 110)])
        ended = site.run()
        assert ended.code == 0, ended.err
        assert "is loaded with 8192 tokens, but 16384 are needed: loading it again" in ended.err
    assert model_of(site).stats()["loads"] == 2


def test_service_reuses_a_larger_window_and_reloads_an_unloaded_model(site: Site, tmp_path: Path) -> None:
    """It looks before a call, at most every ten seconds; callers that come while it loads wait for that one load."""
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "quick_looks.py").write_text(
        "import async_llm_wrapper as window\nwindow.CHECK_EVERY_S = 0.0\nfrom main import app\n"
    )
    model = model_of(site)
    with serve_beside(site, folder, app="quick_looks:app", PYTHONPATH=f"{folder}:{ROOT}") as service:
        assert service.classify().status == 200
        site.source.insert_many([long_conversation(number, 200) for number in range(10)])
        assert site.run().code == 0
        assert service.classify().status == 200
        assert model.requests()[-1]["options"]["num_ctx"] == 16384
        assert model.stats()["loads"] == 2
        model.configure(faults=[{"kind": "unload", "times": 1}], load_delay_s=1.0)
        assert service.classify().status == 200
        model.wait_for("loaded_models", equals=0)
        with concurrent.futures.ThreadPoolExecutor(4) as callers:
            answers = list(callers.map(lambda number: service.classify(conversation(f"{number}")), range(4)))
        assert [answer.status for answer in answers] == [200] * 4
        stats = model.stats()
        assert (stats["loads"], stats["load_requests"], stats["load_aborts"]) == (3, 3, 0)


@pytest.mark.thorough
def test_the_service_is_ready_when_the_model_is_loaded(tmp_path: Path) -> None:
    """It is alive at once, but both routes answer 503 until the model is loaded."""
    with (
        FakeOllama(load_delay_s=6.0, user_message=0) as fake,
        serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", LLM_TIMEOUT_S="1") as service,
    ):
        fake.wait_for("loading", equals=1)
        assert service.get("/health").status == 200
        for answer in (service.get("/ready"), service.classify()):
            assert (answer.status, answer.error) == (503, "ModelUnavailableError")
            assert int(answer.headers["retry-after"]) > 0
        assert "is loading" in service.get("/ready").json["error"]["message"]
        fake.wait_for("loaded_models", at_least=1)
        service.wait_for_metric("triad_model_found", 1)
        assert service.get("/ready").status == 200
        assert service.classify().status == 200
        stats = fake.stats()
        assert (stats["loads"], stats["load_aborts"], stats["chat_requests"]) == (1, 0, 1)


def ask_too_much(service: ServiceProcess) -> Answer:
    messages = [{"sender": "customer", "text": f"{number} {SENTENCE}"} for number in range(450)]
    return service.classify({"conversation_number": "1", "messages": messages})


@pytest.mark.parametrize("mode", mostly_thorough(["fit", "skip", "fail"], 2))
def test_service_truncates_a_long_conversation(site: Site, tmp_path: Path, mode: str) -> None:
    """A truncated conversation is answered with a header; with ON_LONG skip or fail it is refused without a model call."""
    with serve_beside(site, tmp_path, ON_LONG=mode) as service:
        assert "x-input-complete" not in service.classify().headers
        answer = ask_too_much(service)
        if mode == "fit":
            assert answer.status == 200, answer.body
            assert answer.headers["x-input-complete"] == "false"
            assert len(answer.json["messages"]) == 450
        else:
            assert (answer.status, answer.error) == (422, "ConversationTooLongError")
        assert model_of(site).stats()["chat_requests"] == (2 if mode == "fit" else 1)


def test_smaller_window_of_the_server_is_used(site: Site) -> None:
    """The smaller window is used, and said; so is a model that does not fit in the GPU. It is loaded once all the same."""
    site.source.insert_many([long_conversation(number, 120) for number in range(10)])
    model_of(site).configure(most_ctx=5000, vram_share=0.6)
    ended = site.run(OLLAMA_NUM_CTX="8192")
    assert ended.code == 0, ended.err
    assert "the server gave a window of 5000 tokens instead of 8192; using 5000" in ended.err
    assert "40 % of llama3.2 is outside GPU memory" in ended.err
    results = check_labels_are_of_what_was_sent(site)
    assert {result["processing_metadata"]["input_complete"] for result in results.values()} == {False}
    assert model_of(site).stats()["loads"] == 1


@pytest.mark.thorough
def test_model_unloaded_during_a_run_is_loaded_by_one_request(site: Site) -> None:
    """No call starts a load that its own short time-out would abort."""
    site.source.insert_many([document(number) for number in range(20)])
    program = "import sys, cli, async_llm_wrapper as window; window.CHECK_EVERY_S = 0; sys.exit(cli.main())"
    model_of(site).configure(faults=[{"kind": "unload", "when": {"indexes": [9]}}], load_delay_s=2.0)
    environment = site.environment(LLM_TIMEOUT_S="1", MAX_CONCURRENT="1", PYTHONPATH=str(ROOT))
    with WorkerProcess([sys.executable, "-c", program], environment, site.folder / "console") as worker:
        ended = worker.ended()
    assert ended.code == 0, ended.err
    stats = model_of(site).stats()
    assert (stats["loads"], stats["load_requests"], stats["load_aborts"]) == (2, 2, 0)
    assert stats["chat_requests"] == stats["answered"] == 20
