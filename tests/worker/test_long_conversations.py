"""Conversations longer than the window, end to end: no label comes from a prompt that was cut in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cases import mostly_thorough
from tests.worker.long_conversations import SENTENCE, check_labels_are_of_what_was_sent, long_conversation
from tests.worker.site import (
    Document,
    Site,
    conversation,
    model_of,
)

# Both ways of each age of the server to deal with a prompt that is too long, and the one that says how long it is.
SERVERS = {
    "new-native": {"era": "new", "template_path": "native"},
    "new-rendered": {"era": "new", "template_path": "rendered"},
    "old": {"era": "old"},
}


def fill(site: Site) -> list[Document]:
    """Store short conversations, and one each of many turns, of one giant turn, of a few giant turns."""
    documents = [conversation(number) for number in range(6)]
    documents.append(long_conversation(6, 600))
    documents.append(conversation(7, SENTENCE * 700))
    giants = [{"sender": "customer", "text": f"Case 00008 {part}: " + SENTENCE * 200} for part in range(3)]
    documents.append(conversation(8, messages=giants))
    site.source.insert_many(documents)
    return documents


def metadata(result: Document) -> tuple[bool, int, int]:
    made = result["processing_metadata"]
    return made["input_complete"], made["turns_used"], made["turns_total"]


@pytest.mark.parametrize("server", mostly_thorough(SERVERS.values(), 3), ids=list(SERVERS))
def test_long_conversations_are_fitted_and_say_so(site: Site, server: dict[str, Any]) -> None:
    """Short ones stay whole; the others keep as many turns as fit. The prompt is never refused."""
    model_of(site).configure(**server)
    documents = fill(site)
    ended = site.run(OLLAMA_NUM_CTX="8192")
    assert ended.code == 0, ended.err
    results = check_labels_are_of_what_was_sent(site)
    assert len(results) == len(documents)
    assert {metadata(results[number]) for number in range(6)} == {(True, 2, 2)}
    is_complete, used, total = metadata(results[6])
    assert (is_complete, total) == (False, 600)
    assert 20 < used < 300
    assert metadata(results[7]) == (False, 1, 2) or metadata(results[7]) == (False, 2, 2)
    assert metadata(results[8])[0] is False
    stats = model_of(site).stats()
    assert stats["statuses"] == {"200": 9}
    assert {result["processing_metadata"]["attempts"] for result in results.values()} == {1}


@pytest.mark.parametrize("server", mostly_thorough(SERVERS.values(), 3, first=2), ids=list(SERVERS))
@pytest.mark.parametrize(
    "ignores", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["refused", "cut-in-silence"]
)
def test_a_tokenizer_that_makes_more_tokens_than_expected(site: Site, server: dict[str, Any], ignores: bool) -> None:
    """The refusal, or the count that betrays the cut, teaches: the conversation is fitted once more, and then whole."""
    model_of(site).configure(**server, chars_per_token=1.5, ignore_truncate=ignores)
    site.source.insert_many([long_conversation(0, 600), *(conversation(number) for number in range(1, 9))])
    ended = site.run("--max-concurrent", "1", OLLAMA_NUM_CTX="8192")
    assert ended.code == 0, ended.err
    results = check_labels_are_of_what_was_sent(site)
    assert [metadata(results[number])[0] for number in range(9)] == [False] + [True] * 8
    assert [results[number]["processing_metadata"]["attempts"] for number in range(9)] == [2] + [1] * 8
    assert results[0]["processing_metadata"]["prompt_tokens"] <= 8192 - 700


@pytest.mark.parametrize("mode", ["skip", pytest.param("fail", marks=pytest.mark.thorough)])
def test_what_becomes_of_them_is_the_operators_choice(site: Site, mode: str) -> None:
    """Skipped with its reason, or quarantined; the others have their results, and a second run asks for nothing."""
    fill(site)
    ended = site.run("--on-long", mode, OLLAMA_NUM_CTX="8192")
    assert ended.code == (1 if mode == "fail" else 0), ended.err
    assert set(site.results.distinct("source_conversation_id")) == set(range(6))
    after = list(site.source.find({"_id": {"$gte": 6}}))
    assert {document["status"] for document in after} == {"failed" if mode == "fail" else "skipped"}
    assert {document["status_reason"].split(":")[0] for document in after} == {"context_overflow"}
    quarantined = [6, 7, 8] if mode == "fail" else []
    assert sorted(entry["conversation_id"] for entry in site.entries("quarantine")) == quarantined
    asked = model_of(site).stats()["chat_requests"]
    site.run("--on-long", mode, OLLAMA_NUM_CTX="8192")
    assert model_of(site).stats()["chat_requests"] == asked == 6


@pytest.mark.thorough
def test_a_skip_survives_a_crash(site: Site) -> None:
    """A conversation that the journal notes as skipped is skipped by the next run too, and does not fail."""
    documents = [*(long_conversation(number, 600) for number in range(4)), *(conversation(9 + n) for n in range(4))]
    site.source.insert_many(documents)
    flags = ("--on-long", "skip", "--max-concurrent", "1")
    killed = site.run(*flags, plan={"seam": "answered", "passage": 1}, OLLAMA_NUM_CTX="8192")
    assert killed.code < 0
    ended = site.run(*flags, OLLAMA_NUM_CTX="8192")
    assert ended.code == 0, ended.err
    assert site.source.count_documents({"status": "skipped"}) == 4
    assert "queued for retry" not in ended.err
    assert site.results.count_documents({}) == 4


def test_the_window_is_chosen_from_a_sample_and_the_models_limit(site: Site) -> None:
    """Short conversations take 4096 or 8192, longer ones more, none more than the model has; the console says which."""
    site.source.insert_many([conversation(number) for number in range(10)])
    ended = site.run()
    assert "context window: 4096 tokens, holds 100.0% of a sample of 10 conversations" in ended.err
    assert model_of(site).requests()[0]["options"]["num_ctx"] == 4096
    site.source.insert_many([long_conversation(100 + number, 200) for number in range(10)])
    ended = site.run("--logs")
    assert "loading it again" in ended.err
    assert "INFO - batch_processor - context window: 16384 tokens" in ended.err
    assert all(metadata(result)[0] for result in site.results.find())
    model_of(site).configure(models=[{"name": "llama3.2:latest", "context_length": 6000}])
    ended = site.run("--reprocess")
    assert "context window: 6000 tokens, holds 50.0% of a sample of 20 conversations" in ended.err
    assert sum(not metadata(result)[0] for result in site.results.find()) == 10
    last: dict[str, Any] = json.loads(json.dumps(model_of(site).requests()[-1]))
    assert last["options"]["num_ctx"] == 6000
