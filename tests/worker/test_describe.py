"""``--describe``: a second pass writes the sentence into results that lack it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from batch_processor import BatchProcessor
from config import load_settings
from error_handler import StoreUnavailableError
from tests.worker.site import Site, conversation, filled, model_of, requests, until
from worker.describe import DescriptionPass
from worker.service_first import ServiceFirst


def processor_of(site: Site, **settings: Any) -> BatchProcessor:
    place = {"mongodb_uri": site.uri, "db_name": site.database.name, "batch_files_dir": site.directory}
    model = {"ollama_endpoint": model_of(site).url, "ollama_model": "llama3.2", "max_concurrent": 2}
    return BatchProcessor(load_settings(None, **{**place, **model, **settings}))


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
        async with processor_of(site) as processor:
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


def test_describe_keeps_to_subset_and_limit(site: Site) -> None:
    """As the run before it does."""
    site.source.insert_many([conversation(number, channel=("phone", "email")[number % 2]) for number in range(8)])
    emails = ("--filter", '{"channel": "email"}')
    assert site.run("--reply", "list").code == 0
    assert "3 results described" in site.run("--reply", "list", "--describe", *emails, "--limit", "3").out
    assert "1 result described" in site.run("--reply", "list", "--describe", *emails).out
    assert "2 results described" in site.run("--reply", "list", "--describe", "--limit", "2").out
    assert requests(site) == 8 + 3 + 1 + 2
    with_sentence = [key for key, result in stored(site).items() if "categorization" in result["classification"]]
    assert sorted(with_sentence) == [0, 1, 2, 3, 5, 7]


def test_interrupted_pass_after_reprocess_asks_for_no_label_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on with the sentences; a later one labels everything again."""
    filled(site, 4)
    command = ("--reply", "list", "--reprocess", "--describe", "--max-concurrent", "1")
    describe_one = DescriptionPass._one

    async def stopped(self: DescriptionPass, *pair: Any) -> None:
        await describe_one(self, *pair)
        self._stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(DescriptionPass, "_one", stopped)
        assert site.run(*command).code == 130
    assert requests(site) == 5
    assert "3 results described" in site.run(*command).out
    assert requests(site) == 8
    assert "4 results described" in site.run(*command).out


@pytest.mark.parametrize("is_paused", [False, True])
def test_stop_ends_the_pass_in_time(site: Site, *, is_paused: bool) -> None:
    """A call that hangs lasts no longer than the grace period; a paused worker makes none."""
    filled(site, 2)
    assert site.run("--reply", "list").code == 0
    model_of(site).configure(faults=[{"kind": "hang"}])

    async def describe() -> dict[str, Any]:
        async with processor_of(site, shutdown_grace_s=0.1) as processor:
            if is_paused:
                assert processor._heartbeat is not None
                processor._heartbeat.go.clear()
            described = asyncio.create_task(processor.describe())
            if not is_paused:
                await asyncio.to_thread(until, lambda: requests(site) == 4)
            asyncio.get_running_loop().call_later(0.05, processor.stop.set)
            async with asyncio.timeout(10):
                return await described

    assert asyncio.run(describe()) == {"described": 0, "failed": 0, "left": 0, "reasons": {}, "interrupted": True}
    assert requests(site) == (2 if is_paused else 4)


def test_service_goes_before_the_pass(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its lease is held, WORKER_FLOOR calls go on."""

    async def watch(_: ServiceFirst, on_change: Callable[[int | None], None]) -> None:
        on_change(1)

    filled(site, 6)
    assert site.run("--reply", "list").code == 0
    monkeypatch.setattr(ServiceFirst, "watch", watch)
    model_of(site).renew()
    model_of(site).configure(latency_s=0.02)
    assert "6 results described" in site.run("--reply", "list", "--describe").out
    assert model_of(site).stats()["max_in_flight"] == 1


def test_outage_in_the_pass_does_not_end_a_continuous_worker(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass describes the rest; --reprocess counts for the first pass only."""
    filled(site, 2)
    passes = 0
    execute = DescriptionPass.execute

    async def fail_once(self: DescriptionPass) -> dict[str, Any]:
        nonlocal passes
        passes += 1
        if passes == 1:
            raise StoreUnavailableError("away")
        counts = await execute(self)
        self._stop.set()
        return counts

    monkeypatch.setattr(DescriptionPass, "execute", fail_once)
    ended = site.run(*"--reply list --reprocess --describe --mode continuous --poll-interval 1".split())
    assert ended.code == 130, ended.err
    assert "this pass failed; waiting for the next one: away" in ended.err
    assert all(result["classification"]["categorization"] for result in stored(site).values())
    assert requests(site) == 4


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
