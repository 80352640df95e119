"""Confidence and the review mark through the whole worker: every protocol, refusals, crashes, failed writes."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from domain.text import counted
from tests.cases import mostly_thorough
from tests.worker.site import Document, Ended, Site, calls, check_exactly_once, conversation

COUNT = 30
SURE, UNSURE = 0.95, 0.4
PROBABILITIES = {"Negative": UNSURE, "*": SURE}
PATHS = ("/api/chat", "/api/generate", "/v1/chat/completions")


@pytest.fixture
def documents(site: Site) -> list[Document]:
    """Pending conversations; the model gives log probabilities, and is unsure where it says Negative."""
    found = [conversation(number) for number in range(COUNT)]
    site.source.insert_many(found)
    configure(site, PROBABILITIES)
    return found


def configure(site: Site, logprobs: Mapping[str, float] | str | None) -> None:
    assert site.model is not None
    site.model.configure(logprobs=logprobs)


def statistics(site: Site, *flags: str, **settings: str) -> tuple[dict[str, Any], Ended]:
    """Run the worker to its end; return its statistics and what it printed."""
    output = site.folder / "run.json"
    ended = site.run("--output", str(output), *flags, **settings)
    assert ended.code == 0, ended.err
    return json.loads(output.read_text()), ended


def metadata(site: Site) -> list[tuple[str, dict[str, Any]]]:
    """Return the sentiment and the metadata of each result."""
    return [
        (result["classification"]["sentiment"], result["processing_metadata"])
        for result in site.results.find().sort("source_conversation_id")
    ]


def check_marked(site: Site) -> int:
    """Assert that each result has the confidence that the model server chose and the mark for 0.6; return the marked."""
    found = metadata(site)
    assert len(found) == COUNT
    for sentiment, entry in found:
        sure = UNSURE if sentiment == "Negative" else SURE
        assert entry["confidence"] == pytest.approx({"intent": SURE, "topic": SURE, "sentiment": sure}, abs=1e-4)
        assert entry["needs_review"] is (sentiment == "Negative")
    marked = sum(entry["needs_review"] for _, entry in found)
    assert 0 < marked < COUNT
    return marked


def address(site: Site, path: str) -> dict[str, str]:
    assert site.model is not None
    return {"LLM_API_URL": site.model.url + path, "LLM_MODEL": "llama3.2:latest"}


@pytest.mark.parametrize("path", mostly_thorough(PATHS, 3))
def test_low_confidence_results_are_marked_for_review(site: Site, documents: list[Document], path: str) -> None:
    """Stored, marked and counted, whichever protocol the server speaks."""
    stats, ended = statistics(site, "--review-below", "0.6", **address(site, path))
    marked = check_marked(site)
    assert (stats["with_confidence"], stats["needs_review"], stats["review_below"]) == (COUNT, marked, 0.6)
    needing = counted(marked, "result needs", "results need")
    assert f"{needing} review: the confidence of a label is below 0.6" in ended.out
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_no_review_marks_without_review_below(site: Site, documents: list[Document]) -> None:
    stats, ended = statistics(site)
    found = metadata(site)
    assert len(found) == len(documents)
    assert all("confidence" in entry and "needs_review" not in entry for _, entry in found)
    assert (stats["needs_review"], stats["review_below"]) == (0, None)
    assert "review" not in ended.out


@pytest.mark.thorough
def test_review_below_is_read_from_the_environment(site: Site, documents: list[Document]) -> None:
    stats, _ = statistics(site, REVIEW_BELOW="1")
    assert stats["needs_review"] == len(documents)


def test_server_without_log_probabilities_gives_no_confidence(site: Site, documents: list[Document]) -> None:
    """The fields are absent, and the summary says why nothing is marked."""
    configure(site, None)
    stats, ended = statistics(site, "--review-below", "0.6")
    assert all("confidence" not in entry and "needs_review" not in entry for _, entry in metadata(site))
    assert (stats["with_confidence"], stats["needs_review"]) == (0, 0)
    assert "No result is marked for review: the model server returned no log probabilities" in ended.out
    check_exactly_once(site, documents)


@pytest.mark.parametrize("path", mostly_thorough(PATHS, 3, first=2))
def test_server_that_refuses_log_probabilities_is_asked_without_them(
    site: Site, documents: list[Document], path: str
) -> None:
    """Once per call in flight at that moment; no document fails for it."""
    configure(site, "refuse")
    stats, ended = statistics(site, "--review-below", "0.6", "--max-concurrent", "3", **address(site, path))
    assert (stats["successful"], stats["failed"]) == (COUNT, 0)
    assert "returned no log probabilities" in ended.out
    assert site.model is not None
    refused = [entry for entry in site.model.requests() if entry["outcome"] == "400"]
    assert 1 <= len(refused) <= 3
    assert site.model.stats()["chat_requests"] == COUNT + len(refused)
    check_exactly_once(site, documents)


@pytest.mark.parametrize(
    "seam",
    ["before_write", *(pytest.param(seam, marks=pytest.mark.thorough) for seam in ("answered", "results_written"))],
)
def test_confidence_survives_a_crash(site: Site, documents: list[Document], seam: str) -> None:
    """Answers in the journal are stored unchanged; the others are asked for with log probabilities as well."""
    killed = site.run("--review-below", "0.6", plan={"seam": seam, "passage": 2})
    assert killed.code == -signal.SIGKILL, killed.err
    configure(site, None)  # so that only what was kept can have a confidence
    statistics(site, "--review-below", "0.6")
    check_exactly_once(site, documents)
    kept = [(sentiment, entry) for sentiment, entry in metadata(site) if "confidence" in entry]
    assert kept
    assert all(entry["needs_review"] is (sentiment == "Negative") for sentiment, entry in kept)


@pytest.mark.thorough
def test_unwritten_result_keeps_its_review_mark(site: Site, documents: list[Document]) -> None:
    """It is written later without asking again, and counted then."""
    site.database.create_collection("sentimental_analysis", validator={"classification.sentiment": {"$ne": "Negative"}})
    ended = site.run("--review-below", "0.6")
    entries = site.entries("quarantine")
    assert ended.code in (1, 4), ended.err
    assert entries
    assert {entry["status"] for entry in entries} == {"write_failed"}
    asked = [calls(site, document) for document in documents]
    site.database.command("collMod", "sentimental_analysis", validator={})
    configure(site, None)
    stats, _ = statistics(site, "--retry-failed", "--review-below", "0.6")
    assert stats["needs_review"] >= len(entries)
    assert check_marked(site) == len(entries)
    assert [calls(site, document) for document in documents] == asked
    check_exactly_once(site, documents)
