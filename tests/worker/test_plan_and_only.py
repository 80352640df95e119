"""``cli.py plan`` lists what there is to do, ``--only`` does just that; asked again, nothing is done twice."""

from __future__ import annotations

import json
import signal
import uuid
from pathlib import Path
from typing import Any

import bson
import pytest

from batch_processor import BatchProcessor
from config import load_settings
from config.taxonomy import DEFAULT_TAXONOMY
from storage import extended_json
from tests.worker.site import (
    Document,
    Site,
    calls,
    check_directory,
    check_exactly_once,
    check_results,
    conversation,
    filled,
    key,
    model_of,
    requests,
    user_message,
)
from tests.worker.test_documents_in_a_run import with_odd_ids

CONCURRENCY = 6
KINDS = ("new", "changed", "stale", "failed", "skipped", "done", "foreign")
OTHER_MODEL = {"OLLAMA_MODEL": "qwen3:8b"}


def plan(site: Site, *flags: str, **settings: str) -> dict[str, Any]:
    ended = site.run("plan", "--json", *flags, **settings)
    assert ended.code == 0, ended.err
    return dict(json.loads(ended.out))


def counts(site: Site, **settings: str) -> dict[str, int]:
    """Return the counts above 0."""
    report = plan(site, **settings)
    return {kind: report[kind] for kind in KINDS if report[kind]}


def ids(site: Site, kind: str, **settings: str) -> list[Any]:
    ended = site.run("plan", "--ids", kind, "--json", **settings)
    assert ended.code == 0, ended.err
    return [extended_json.loads(line) for line in ended.out.splitlines()]


def edit(site: Site, *numbers: int) -> list[Document]:
    """Give these documents another text, as an import of a longer conversation does; return them as they are now."""
    for number in numbers:
        change = {"messages": conversation(number, "it is about something else now")["messages"]}
        site.source.update_one({"_id": number}, {"$set": change})
    return list(site.source.find({"_id": {"$in": list(numbers)}}).sort("_id", 1))


def mixed(site: Site) -> dict[str, list[int]]:
    """Leave documents of every kind: 0-29 done, of which 3 and 4 are changed, 5 to 7 stale; 30 failed, 31 skipped; 40-44 new."""
    assert site.model is not None
    filled(site, 30)
    site.source.insert_many([conversation(30), conversation(31, messages=[{"sender": "agent", "text": "Hello?"}])])
    site.model.configure(faults=[{"kind": "wrong_label", "when": {"text": "Case 00030"}}])
    assert site.run().code == 1
    site.model.configure(faults=[])
    edit(site, 3, 4)
    made = "processing_metadata.fingerprint"
    site.results.update_one({"source_conversation_id": 5}, {"$unset": {made: 1}})
    site.results.update_one({"source_conversation_id": 6}, {"$set": {made: "0" * 64}})
    site.results.update_one({"source_conversation_id": 7}, {"$unset": {made: 1, "processing_metadata.input_sha256": 1}})
    filled(site, 5, first=40)
    site.source.insert_one(conversation(50, status="archived"))
    done = [number for number in range(30) if number not in (3, 4, 5, 6, 7)]
    kinds = {"new": [40, 41, 42, 43, 44], "changed": [3, 4], "stale": [5, 6, 7], "failed": [30], "skipped": [31]}
    return {**kinds, "done": done, "foreign": [50]}


def state_of(site: Site) -> Any:
    return site.database.command("dbHash")["md5"], {path: path.read_bytes() for path in site.files()}


def test_plan_counts_every_kind(site: Site) -> None:
    """Counts and ids; nothing is changed, nothing is asked. Also without a model server, and by the dry run."""
    kinds = mixed(site)
    before, asked = state_of(site), requests(site)
    report = plan(site)
    assert {kind: report[kind] for kind in KINDS} == {kind: len(kinds[kind]) for kind in KINDS}
    assert report["documents"] == 38
    assert {kind: ids(site, kind) for kind in KINDS} == kinds
    shown = site.run("plan").out
    assert "stale         3  labelled by another prompt, taxonomy, model or options" in shown
    check_offline_plan(site, kinds)
    check_dry_run(site, "stale", kinds["stale"])
    assert state_of(site) == before
    assert requests(site) == asked
    elsewhere = site.sibling("never_made")
    assert plan(elsewhere)["failed"] == 1, "the status in MongoDB is enough, without the local files"
    assert not elsewhere.directory.exists()


def check_offline_plan(site: Site, kinds: dict[str, list[int]]) -> None:
    """Without a model server: exit code 3 and the way out; --offline tells everything but stale from done."""
    away = {"OLLAMA_ENDPOINT": "http://127.0.0.1:1"}
    ended = site.run("plan", **away)
    assert ended.code == 3
    assert "--offline" in ended.err
    report = plan(site, "--offline", **away)
    assert (report["new"], report["changed"], report["failed"]) == (5, 2, 1)
    assert report["unjudged"] == len(kinds["done"]) + len(kinds["stale"])
    assert "stale" not in report
    assert "done" not in report
    assert site.run("plan", "--offline", "--ids", "stale", **away).code == 2


def check_dry_run(site: Site, kind: str, numbers: list[int]) -> None:
    """The dry run of ``--only`` *kind* reports the *numbers* that plan says."""
    ended = site.run("--dry-run", "--only", kind)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["selected"], report["to_classify"]) == (len(numbers), len(numbers))
    assert report["first_ids"] == [str(number) for number in numbers][:10]
    limited = json.loads(site.run("--dry-run", "--only", kind, "--limit", "1").out)
    assert limited["selected"] == 1


def test_other_model_or_taxonomy_makes_results_stale(site: Site, tmp_path: Path) -> None:
    """Whatever decides an answer; a larger time-out does not."""
    filled(site, 8)
    assert site.run().code == 0
    assert counts(site, LLM_TIMEOUT_S="77") == {"done": 8}
    assert counts(site, **OTHER_MODEL) == {"stale": 8}
    taxonomy = tmp_path / "taxonomy.yaml"
    taxonomy.write_text(DEFAULT_TAXONOMY.read_text().replace("definition: Expresses", "definition: Expresses strong"))
    assert counts(site, TAXONOMY_FILE=str(taxonomy)) == {"stale": 8}


def test_ids_of_every_bson_type(site: Site) -> None:
    """Pages go on across types; each id comes out with its type, and once."""
    documents = with_odd_ids()
    site.source.insert_many(documents)
    assert [key(value) for value in ids(site, "new", BATCH_SIZE="4")] == [
        key(document["_id"]) for document in site.source.find({}, {"_id": 1}).sort("_id", 1)
    ]
    site.source.insert_one(conversation(99) | {"_id": bson.Binary.from_uuid(uuid.uuid4())})
    assert plan(site, BATCH_SIZE="3")["new"] == len(documents) + 1


def test_only_new_and_only_failed(site: Site) -> None:
    """New: neither the failed nor the stale ones, and the retry queue of others stays where it is.

    Failed: the quarantined one gets fresh attempts, and the new ones are not touched.
    """
    kinds = mixed(site)
    asked = requests(site)
    ended = site.run("--only", "new")
    assert requests(site) == asked + len(kinds["new"])
    assert ended.code == 1, "one is in quarantine, as before"
    assert counts(site) == {"changed": 2, "stale": 3, "failed": 1, "skipped": 1, "done": 30, "foreign": 1}
    assert site.run("--only", "new").code == 1
    assert requests(site) == asked + len(kinds["new"])
    filled(site, 5, first=60)
    ended = site.run("--only", "failed")
    assert ended.code == 0, ended.err
    assert requests(site) == asked + len(kinds["new"]) + 1
    assert site.entries("quarantine") == []
    left = counts(site)
    assert left["new"] == 5
    assert "failed" not in left


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["changed", "stale"])
def test_only_changed_and_only_stale_replace_results(site: Site, kind: str) -> None:
    """Those results are replaced, no other is touched, and a second time there is nothing to do."""
    kinds = mixed(site)
    before = {result["source_conversation_id"]: result for result in site.results.find()}
    asked = requests(site)
    ended = site.run("--only", kind)
    assert ended.code == 1, ended.err  # one is in quarantine, as before
    assert requests(site) == asked + len(kinds[kind])
    after = {result["source_conversation_id"]: result for result in site.results.find()}
    assert after.keys() == before.keys()
    assert [number for number in sorted(after) if after[number] != before[number]] == kinds[kind]
    as_labelled = {number: conversation(number) for number in (kinds["changed"] if kind == "stale" else ())}
    check_results(site, [as_labelled.get(number) or site.source.find_one({"_id": number}) for number in after])
    assert counts(site).get(kind, 0) == 0
    assert {site.source.find_one({"_id": number})["status"] for number in kinds[kind]} == {"processed"}
    assert site.run("--only", kind).code == 1
    assert requests(site) == asked + len(kinds[kind])


@pytest.mark.thorough
def test_dry_run_reports_the_only_selection(site: Site) -> None:
    """Of the kinds that test_plan_counts_every_kind leaves out; nothing is changed."""
    kinds = mixed(site)
    before = state_of(site)
    for kind in ("new", "changed", "failed"):
        check_dry_run(site, kind, kinds[kind])
    assert state_of(site) == before


@pytest.mark.parametrize("flag", ["--reprocess", "--retry-failed"])
def test_conflicting_selections_are_refused(site: Site, flag: str) -> None:
    """Each chooses the documents."""
    ended = site.run("--only", "stale", flag)
    assert ended.code == 2
    assert "use one of them" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "seam",
    [
        "results_written",
        *(
            pytest.param(seam, marks=pytest.mark.thorough)
            for seam in ("answered", "pending_saved", "before_write", "marked", "released")
        ),
    ],
)
def test_only_stale_resumes_after_a_crash(site: Site, seam: str) -> None:
    """Replaced results are not asked for again; in the end each document has one result, of the new model."""
    documents = filled(site, 24)
    assert site.run().code == 0
    asked = requests(site)
    flags = ("--only", "stale", "--batch-size", "5")
    point = {"seam": seam, "passage": 1 if seam == "marked" else 3}  # statuses are marked once a second
    assert site.run(*flags, plan=point, **OTHER_MODEL).code == -signal.SIGKILL
    ended = site.run(*flags, **OTHER_MODEL)
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    assert requests(site) <= asked + len(documents) + CONCURRENCY
    assert site.results.distinct("processing_metadata.model_used") == ["qwen3:8b"]
    assert counts(site, **OTHER_MODEL) == {"done": 24}


def interrupted_only_stale(site: Site) -> list[Document]:
    documents = filled(site, 40)
    assert site.run().code == 0
    killed = site.run("--only", "stale", "--batch-size", "10", plan={"seam": "answered", "passage": 13}, **OTHER_MODEL)
    assert killed.code == -signal.SIGKILL
    assert site.source.count_documents({"status": "processing"}) > 0
    return documents


@pytest.mark.thorough
def test_plain_run_finishes_an_interrupted_only_stale(site: Site) -> None:
    """Results stay as they are and the sources say processed again; --only stale does the rest later."""
    documents = interrupted_only_stale(site)
    asked = requests(site)
    ended = site.run(**OTHER_MODEL)
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    assert requests(site) == asked
    stale = counts(site, **OTHER_MODEL)["stale"]
    assert stale > 0, "everything had been replaced: this proves nothing"
    assert site.run("--only", "stale", **OTHER_MODEL).code == 0
    assert requests(site) == asked + stale
    check_exactly_once(site, documents)
    assert counts(site, **OTHER_MODEL) == {"done": 40}


@pytest.mark.parametrize("kind", ["failed", "stale", "changed", "new"])
@pytest.mark.thorough
def test_only_run_finishes_batches_of_an_interrupted_plain_run(site: Site, kind: str) -> None:
    """Its answers are in the journal; the documents that were only pending are left to a plain run."""
    documents = filled(site, 40)
    killed = site.run("--batch-size", "10", plan={"seam": "before_write", "passage": 2})
    assert killed.code == -signal.SIGKILL
    ended = site.run("--only", kind)
    assert ended.code == 0, ended.err
    assert site.source.count_documents({"status": "processing"}) == 0
    check_directory(site)
    assert site.run().code == 0
    check_exactly_once(site, documents)
    assert requests(site) <= 40 + CONCURRENCY


@pytest.mark.thorough
def test_stale_documents_that_fail_keep_their_result_and_are_retried(site: Site) -> None:
    """Also when the run dies between two of them; until another answer is there, the old result stays."""
    assert site.model is not None
    documents = filled(site, 30)
    assert site.run().code == 0
    faults = [{"kind": "wrong_label", "when": {"text": f"Case {number:05d}"}, "times": 2} for number in (4, 12)]
    site.model.configure(faults=faults)
    flags = ("--only", "stale", "--batch-size", "10")
    killed = site.run(*flags, plan={"seam": "retry_saved", "passage": 2}, **OTHER_MODEL)
    assert killed.code == -signal.SIGKILL
    assert site.results.count_documents({}) == 30
    assert site.entries("retry")
    ended = site.run(*flags, **OTHER_MODEL)
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    assert counts(site, **OTHER_MODEL) == {"done": 30}


@pytest.mark.thorough
def test_edit_during_a_run_is_changed_in_the_next_plan(site: Site) -> None:
    """The result says which text it is of."""
    assert site.model is not None
    documents = filled(site, 6)
    site.model.configure(latency_s=1.0)
    with site.start() as worker:
        site.model.wait_for("in_flight", equals=6, timeout_s=30)
        (edited,) = edit(site, 2)
        assert worker.ended().code == 0
    assert calls(site, documents[2]) == 1
    assert ids(site, "changed") == [2]
    assert site.run("--only", "changed").code == 0
    assert calls(site, edited) == 1
    check_results(site, [*documents[:2], edited, *documents[3:]])
    assert counts(site) == {"done": 6}
    assert user_message(edited) != user_message(documents[2])


@pytest.mark.thorough
def test_only_stale_ignores_the_mark_of_a_plain_run(site: Site) -> None:
    """The low-water mark of an interrupted run applies to the selection of that run."""
    stale = filled(site, 10)
    assert site.run().code == 0
    later = filled(site, 150, first=100)
    killed = site.run("--batch-size", "10", plan={"seam": "completed", "passage": 12})
    assert killed.code == -signal.SIGKILL
    assert extended_json.loads((site.directory / "checkpoint.json").read_bytes())["has_mark"]
    assert site.run("--only", "stale", **OTHER_MODEL).code == 0
    models = {result["source_conversation_id"]: result["processing_metadata"] for result in site.results.find()}
    assert {models[document["_id"]]["model_used"] for document in stale} == {"qwen3:8b"}
    assert site.run(**OTHER_MODEL).code == 0
    check_exactly_once(site, stale + later)


@pytest.mark.thorough
def test_quarantined_stale_document_keeps_its_result(site: Site) -> None:
    """It is failed until --only failed gives it up as that; then it is stale again, and can be asked."""
    assert site.model is not None
    documents = filled(site, 20)
    assert site.run().code == 0
    site.model.configure(faults=[{"kind": "wrong_label", "when": {"text": "Case 00004"}}])
    assert site.run("--only", "stale", **OTHER_MODEL).code == 1
    assert counts(site, **OTHER_MODEL) == {"failed": 1, "done": 19}
    assert site.results.count_documents({}) == 20
    site.model.configure(faults=[])
    assert site.run("--only", "failed", **OTHER_MODEL).code == 0
    assert counts(site, **OTHER_MODEL) == {"stale": 1, "done": 19}
    assert site.run("--only", "stale", **OTHER_MODEL).code == 0
    check_exactly_once(site, documents)


@pytest.mark.thorough
def test_only_stale_leaves_the_retry_queue_of_other_runs_alone(site: Site) -> None:
    """Neither new nor changed takes from it."""
    assert site.model is not None
    documents = filled(site, 20)
    site.model.configure(faults=[{"kind": "wrong_label", "when": {"text": "Case 00004"}, "times": 2}])
    assert site.run("--batch-size", "10", plan={"seam": "completed", "passage": 2}).code == -signal.SIGKILL
    assert [entry["conversation_id"] for entry in site.entries("retry")] == [4]
    for kind in ("new", "changed"):
        assert site.run("--only", kind).code == 1
        assert [entry["conversation_id"] for entry in site.entries("retry")] == [4]
    assert site.run("--only", "failed").code == 0
    check_exactly_once(site, documents)


def test_one_digest_under_two_names_is_one_model(site: Site) -> None:
    """Another digest, or another prompt, makes results stale under any name."""
    filled(site, 3)
    model_of(site).configure(models=["llama3.2:latest", {"name": "mine", "copy_of": "llama3.2:latest"}])
    assert site.run().code == 0
    assert counts(site, OLLAMA_MODEL="mine") == {"done": 3}
    assert site.run("--only", "stale", OLLAMA_MODEL="mine").code == 0
    assert {result["processing_metadata"]["model_used"] for result in site.results.find()} == {"llama3.2"}
    model_of(site).configure(models=["mine"])
    assert counts(site, OLLAMA_MODEL="mine") == {"stale": 3}


def test_no_model_is_loaded_without_work(site: Site) -> None:
    filled(site, 3)
    assert site.run().code == 0
    model_of(site).configure(faults=[{"kind": "unload", "times": 1}])
    for flags in ((), ("--only", "stale"), ("--only", "failed"), ("--retry-failed",), ("--only", "new")):
        assert site.run(*flags).code == 0
        assert model_of(site).stats()["load_requests"] == 1, flags


@pytest.mark.thorough
@pytest.mark.parametrize("flags", [("--reprocess",), ("--only", "changed"), ("--retry-failed",)])
def test_model_is_loaded_for_documents_of_every_selection(site: Site, flags: tuple[str, ...]) -> None:
    filled(site, 3)
    assert site.run().code == 0
    edit(site, 1)
    site.source.insert_one(conversation(9, status="failed"))
    assert site.run(*flags).code == 0
    assert model_of(site).stats()["load_requests"] == 2


async def test_documents_that_come_later_load_the_model(site: Site) -> None:
    """As in a continuous run, whose first pass found nothing."""
    names = {"mongodb_uri": site.uri, "db_name": site.database.name, "batch_files_dir": site.directory}
    settings = load_settings(dotenv=None, ollama_endpoint=model_of(site).url, ollama_model="llama3.2", **names)
    async with BatchProcessor(settings) as processor:
        assert (await processor.run())["documents_processed"] == 0
        assert model_of(site).stats()["load_requests"] == 0
        filled(site, 3)
        assert (await processor.run())["successful"] == 3
    assert model_of(site).stats()["load_requests"] == 1
