"""``--describe``: a second pass writes the sentence into results that lack it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batch_processor import BatchProcessor
from config import load_settings
from tests.worker.site import Site, conversation, filled, requests


def stored(site: Site) -> dict[Any, dict[str, Any]]:
    return {
        result["source_conversation_id"]: result
        for result in site.results.find({"source_conversation_id": {"$ne": None}})
    }


def test_describe_adds_the_sentence_and_changes_no_label(site: Site) -> None:
    filled(site, 12)
    ended = site.run("--reply", "list", "--describe")
    assert ended.code == 0, ended.err
    assert "12 results described, 0 failed, 0 left" in ended.out
    results = stored(site)
    assert requests(site) == 24
    assert site.run("--reprocess").code == 0  # in the style full
    for key, full in stored(site).items():
        assert results[key]["classification"] == full["classification"]
        assert results[key]["processing_metadata"]["described_by"] == "llama3.2"
        assert "described_by" not in full["processing_metadata"]


def test_describe_resumes_and_finds_nothing_twice(site: Site) -> None:
    """Failures keep their labels and are described by the next run; the exit code is that of an unfinished run."""
    assert site.model is not None
    filled(site, 6)
    assert site.run("--reply", "labels").code == 0
    before = stored(site)
    assert all("categorization" not in result["classification"] for result in before.values())
    site.model.configure(faults=[{"kind": "empty_content", "when": {"text": "Case 00003"}}])
    ended = site.run("--reply", "labels", "--describe")
    assert ended.code == 1
    assert "5 results described, 1 failed, 1 x empty" in ended.out
    assert stored(site)[3] == before[3]
    site.model.configure(faults=[])
    count = requests(site)
    assert "1 result described, 0 failed" in site.run("--reply", "labels", "--describe").out
    assert requests(site) == count + 1
    assert "0 results described" in site.run("--reply", "labels", "--describe").out
    for key, result in stored(site).items():
        labels = dict(result["classification"])
        assert labels.pop("categorization")
        assert labels == before[key]["classification"]


def test_changed_and_deleted_conversations_are_left(site: Site) -> None:
    filled(site, 4)
    assert site.run("--reply", "list").code == 0
    site.source.update_one({"_id": 1}, {"$set": {"messages": conversation(1, "something else")["messages"]}})
    site.source.delete_one({"_id": 2})
    site.results.insert_one({"classification": {"intent": "Other"}})  # of another program
    assert "2 results described, 0 failed, 2 left" in site.run("--reply", "list", "--describe").out
    without = [key for key, result in stored(site).items() if "categorization" not in result["classification"]]
    assert sorted(without) == [1, 2]


def test_sentence_is_not_written_over_other_labels(site: Site) -> None:
    """The result was replaced for another text while the model wrote."""
    filled(site, 1)
    assert site.run("--reply", "list").code == 0

    async def describe() -> dict[str, Any]:
        settings = load_settings(
            None,
            mongodb_uri=site.uri,
            db_name=site.database.name,
            batch_files_dir=site.directory,
            ollama_endpoint=site.model.url if site.model else "",
            ollama_model="llama3.2",
            max_concurrent=2,
        )
        async with BatchProcessor(settings) as processor:
            assert processor._window is not None
            classify = processor._window.classify

            async def slow(*arguments: Any) -> Any:
                outcome = await classify(*arguments)
                site.results.update_one({}, {"$set": {"processing_metadata.input_sha256": "0" * 64}})
                return outcome

            processor._window.classify = slow  # type: ignore[method-assign]
            return await processor.describe()

    counts = asyncio.run(describe())
    assert (counts["described"], counts["left"]) == (0, 1)
    assert "categorization" not in stored(site)[0]["classification"]


def test_describe_is_refused_for_a_taxonomy_without_sentence(site: Site, tmp_path: Any) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_text("categorization: false\nfields: {escalate: [Yes, No]}", encoding="utf-8")
    filled(site, 1)
    ended = site.run("--describe", TAXONOMY_FILE=str(path))
    assert ended.code == 2
    assert "categorization: false" in ended.err


@pytest.mark.parametrize("style", [pytest.param("labels", marks=pytest.mark.thorough), "list"])
def test_style_alone_makes_results_stale_only_on_request(site: Site, style: str) -> None:
    filled(site, 5)
    assert site.run().code == 0
    count = requests(site)
    assert site.run("--only", "stale", "--reply", style).code == 0
    assert site.run("--reply", style).code == 0
    assert requests(site) == count
    assert "style         5" in site.run("plan", REPLY_STYLE=style).out
    assert site.run("--only", "style", "--reply", style).code == 0
    assert requests(site) == count + 5
    assert all("categorization" not in result["classification"] for result in stored(site).values())
    assert "done          5" in site.run("plan", REPLY_STYLE=style).out
