"""A run in the reply style ``score`` with llama.cpp and vLLM: what is stored, and what the next run thinks of it."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.fake_vllm import MODEL, Vllm, fake_vllm
from tests.fakes.scripted_server import ScriptedServer
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.worker.site import Site, filled

TAXONOMY = """
intents: {Status: where it is, Refund: money back, Other: else}
topics: {Parcel: delivery, Parcel Insurance: claims, Other: else}
sentiments: [Positive, Neutral, Negative]
"""


def asks(site: Site, url: str, model: str, tmp_path: Path) -> None:
    """Let the runs of *site* ask the *model* at *url* for scores, two conversations at a time."""
    path = tmp_path / "labels.yaml"
    path.write_text(TAXONOMY, encoding="utf-8")
    site.model = None
    site.settings |= {
        "LLM_API_URL": f"{url}/v1/chat/completions",
        "LLM_MODEL": model,
        "TAXONOMY_FILE": str(path),
        "REPLY_STYLE": "score",
        "MAX_CONCURRENT": "2",
    }


def test_run_stores_labels_with_confidence_and_knows_them_again(site: Site, engine: TinyEngine, tmp_path: Path) -> None:
    asks(site, engine.url, MODEL_NAME, tmp_path)
    filled(site, 4)
    ended = site.run()
    assert ended.code == 0, ended.err
    assert "score" not in ended.err, "no warning"
    results = list(site.results.find())
    assert len(results) == 4
    for result in results:
        assert list(result["classification"]) == ["intent", "topic", "sentiment"]
        metadata = result["processing_metadata"]
        assert all(0 < value <= 1 for value in metadata["confidence"].values())
        assert metadata["confidence"].keys() == set(result["classification"])
        assert metadata["reply_tokens"] <= 9
    assert re.search(r"^done +4 ", site.run("plan").out, re.MULTILINE)
    assert re.search(r"^style +4 ", site.run("plan", REPLY_STYLE="list").out, re.MULTILINE)
    checked = site.run("doctor")
    assert "The test conversation got valid labels" in checked.out, checked.out


COUNT = 8
# The labels are the likeliest ones in turn; three tokens are read at least, one for each field.
WEIGHTS = {
    '<assistant>["': {"Refund": 7, "Status": 2, "Other": 1},
    '"Refund","': {"Parcel": 9, "Other": 1},
    "Parcel": {" Insurance": 3, '","': 1},
    'Insurance","': {"Negative": 8, "Positive": 1, "Neutral": 1},
}


def prompts(server: ScriptedServer) -> Counter[str]:
    """Return how often each conversation was asked about."""
    bodies = [json.loads(request.body) for request in server.requests if request.path == "/tokenize"]
    return Counter(body["messages"][-1]["content"] for body in bodies if "messages" in body)


def check_results(site: Site) -> None:
    results = list(site.results.find())
    assert len(results) == len({result["source_conversation_id"] for result in results}) == COUNT
    for result in results:
        assert result["classification"] == {"intent": "Refund", "topic": "Parcel Insurance", "sentiment": "Negative"}
        metadata = result["processing_metadata"]
        assert metadata["confidence"] == pytest.approx({"intent": 0.7, "topic": 0.675, "sentiment": 0.8})
        assert metadata["reply_tokens"] == 4


def test_run_with_vllm_stores_labels_with_confidence(site: Site, tmp_path: Path) -> None:
    with fake_vllm(Vllm(WEIGHTS)) as server:
        asks(site, server.url, MODEL, tmp_path)
        filled(site, COUNT)
        ended = site.run()
        assert ended.code == 0, ended.err
        assert "score" not in ended.err, "no warning"
        check_results(site)
        assert set(prompts(server).values()) == {1}
        assert len(prompts(server)) == COUNT
        assert len(server.chats) == 4 * COUNT
        assert re.search(rf"^done +{COUNT} ", site.run("plan").out, re.MULTILINE)
        checked = site.run("doctor")
        assert "The test conversation got valid labels" in checked.out, checked.out


def test_run_with_an_older_vllm_gets_the_list(site: Site, tmp_path: Path) -> None:
    """It ignores the parameter. Nothing fails for it, and each conversation has one answer."""
    with fake_vllm(Vllm(WEIGHTS, ids="ignored")) as server:
        asks(site, server.url, MODEL, tmp_path)
        filled(site, COUNT)
        ended = site.run()
        assert ended.code == 0, ended.err
        assert ended.err.count("the reply style is now list") == 1
        assert site.results.count_documents({"classification.intent": "Status"}) == COUNT
        kinds = Counter(request.path for request in server.chats)
    assert kinds["/v1/chat/completions"] == COUNT
    assert kinds["/v1/completions"] <= 2, "once for each call in flight at that moment"


@dataclass
class Waiting(Vllm):
    """Waits with the answer to the seventh call until it is *free*."""

    free: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        if self.calls == 7:
            self.free.wait(30)
        return super().complete(body)


def test_stopped_run_ends_its_conversations_and_asks_none_again(site: Site, tmp_path: Path) -> None:
    with fake_vllm(vllm := Waiting(WEIGHTS)) as server:
        asks(site, server.url, MODEL, tmp_path)
        filled(site, COUNT)
        with site.start() as worker:
            server.wait_for_chats(7)
            worker.send(signal.SIGTERM)
            worker.await_text("finishing the calls in flight")
            vllm.free.set()
            assert worker.ended().code == 130
        stored = site.results.count_documents({})
        assert 0 < stored < COUNT
        assert len(prompts(server)) == stored
        assert site.run().code == 0
        check_results(site)
        assert set(prompts(server).values()) == {1}
        assert len(server.chats) == 4 * COUNT


@pytest.mark.slow
@pytest.mark.parametrize("seam", ["before_write", "answered"])
def test_killed_run_keeps_the_labels_that_it_has(site: Site, tmp_path: Path, seam: str) -> None:
    with fake_vllm(Vllm(WEIGHTS)) as server:
        asks(site, server.url, MODEL, tmp_path)
        filled(site, COUNT)
        killed = site.run(plan={"seam": seam, "passage": 1 if seam == "before_write" else 4})
        assert killed.code == -signal.SIGKILL, killed.err
        assert site.run().code == 0
        check_results(site)
        again = sum(prompts(server).values()) - COUNT
    assert again <= 2, "those in flight"
