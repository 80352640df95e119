"""``cli.py evaluate`` with a real MongoDB and, for ``--run``, a fake model server."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import Int64, ObjectId
from pymongo.database import Database

from aggregator import aggregate_conversation
from config import load_taxonomy
from prompt_builder import chat_messages
from storage.extended_json import canonical
from tests.fakes.fake_ollama import expected_labels
from tests.forked_process import Ended
from tests.in_process import run_cli
from tests.worker.site import Site, conversation, model_of, requests, until

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("numpy", "scipy")),
    reason="requirements-evaluation.txt is not installed",
)

Document = dict[str, Any]
SECRET = "canary-4711"
SENTIMENTS = ("Positive", "Neutral", "Negative")


@pytest.fixture
def place(mongodb_uri: str, database: Database[dict[str, Any]], tmp_path: Path) -> Site:
    """Return a site without a model server."""
    return Site(mongodb_uri, database, None, tmp_path)


def evaluate(site: Site, *flags: str, **settings: str) -> Ended:
    return Ended(*run_cli(["evaluate", *flags], site.environment(**settings), site.folder))


def result(number: int, sentiment: str, confidence: float | None = None, model: str = "m1") -> Document:
    metadata: Document = {"model_used": model, "fingerprint": f"{model}-{number}"}
    if confidence is not None:
        metadata["confidence"] = {"intent": 0.9, "topic": 0.9, "sentiment": confidence}
    return {
        "source_conversation_id": number,
        "conversation_number": str(number),
        "classification": {"intent": "Complaint", "topic": "Other", "sentiment": sentiment, "categorization": SECRET},
        "processing_metadata": metadata,
    }


def write_gold(site: Site, lines: list[Document], name: str = "gold.jsonl") -> str:
    path = site.folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def report_of(site: Site, *flags: str, code: int = 0) -> Document:
    path = site.folder / "report.json"
    ended = evaluate(site, *flags, "--output", str(path))
    assert ended.code == code, ended.said
    report: Document = json.loads(path.read_bytes())
    return report


def field_of(report: Document, name: str) -> Document:
    (figures,) = [each for each in report["fields"] if each["field"] == name]
    return dict(figures)


@pytest.fixture
def judged(place: Site) -> Site:
    """Return a site with 30 results whose sentiment is Positive, Neutral and Negative in turn."""
    place.source.insert_many([conversation(number, SECRET) for number in range(31)])
    place.results.insert_many(
        [result(number, SENTIMENTS[number % 3], 0.95 if number % 3 else 0.55) for number in range(30)]
    )
    return place


def gold_lines(count: int = 30) -> list[Document]:
    """Return gold labels: Positive is wrong in each second case, the others are right."""
    return [
        {"_id": number, "sentiment": "Negative" if number % 6 == 0 else SENTIMENTS[number % 3]}
        for number in range(count)
    ]


def test_report_has_figures_confusions_and_calibration(judged: Site) -> None:
    """The screen, the JSON file and the page have the same figures, and no text of a conversation."""
    page = judged.folder / "report.html"
    output = judged.folder / "report.json"
    gold = write_gold(judged, gold_lines())
    ended = evaluate(judged, "--gold", gold, "--html", str(page), "--output", str(output))
    assert ended.code == 0, ended.said
    report = json.loads(output.read_bytes())
    assert [each["field"] for each in report["fields"]] == ["sentiment"]
    figures = field_of(report, "sentiment")
    assert figures["n"] == 30
    assert figures["accuracy"]["value"] == pytest.approx(25 / 30)
    assert figures["confusions"] == [
        {"gold": "Negative", "model": "Positive", "n": 5, "ids": ["0", "6", "12", "18", "24"]}
    ]
    bins = [(each["low"], each["accuracy"]["n"], each["accuracy"]["value"]) for each in figures["calibration"]["bins"]]
    assert bins == [(0.5, 10, 0.5), (0.9, 20, 1.0)]
    assert report["models"] == [{"model": "m1", "n": 30}]
    for shown in (ended.out, page.read_text()):
        assert ".83 (.66–.93)" in shown
        assert "0.050" in shown  # ECE
    for written in (ended.said, page.read_text(), output.read_text()):
        assert SECRET not in written
    assert output.stat().st_mode & 0o777 == 0o600


def test_examples_of_the_prompt_are_not_gold(judged: Site) -> None:
    """The model has seen their answers, whether it labels them in this run or did before."""
    answer = {"categorization": "c", "intent": "Complaint", "topic": "Other", "sentiment": "Positive"}
    entry = {"transcript": "Customer: hello", "source": canonical(3), "answer": answer}
    examples = judged.folder / "examples.json"
    examples.write_text(json.dumps({"examples": [entry]}))
    gold = write_gold(judged, gold_lines())
    ended = evaluate(judged, "--gold", gold, PROMPT_EXAMPLES_FILE=str(examples))
    assert ended.code == 0, ended.said
    assert "an example in the prompt" in ended.said
    assert ended.out.startswith("29 conversations with gold labels")


@pytest.mark.parametrize("is_known", [True, False])
def test_copy_of_an_example_is_not_gold(judged: Site, is_known: bool) -> None:
    """The same text has the same answer. Files of earlier versions have no hash, but the text, here without masked data."""
    text = "Customer: hello"
    answer = {"categorization": "c", "intent": "Complaint", "topic": "Other", "sentiment": "Positive"}
    entry = {"transcript": text, "source": canonical(999), "answer": answer}
    if is_known:
        entry |= {"transcript": "Customer: <NAME_1>", "input_sha256": hashlib.sha256(text.encode()).hexdigest()}
    examples = judged.folder / "examples.json"
    examples.write_text(json.dumps({"examples": [entry]}))
    change = {"$set": {"processing_metadata.input_sha256": hashlib.sha256(text.encode()).hexdigest()}}
    judged.results.update_many({"source_conversation_id": {"$in": [3, 7]}}, change)
    ended = evaluate(judged, "--gold", write_gold(judged, gold_lines()), PROMPT_EXAMPLES_FILE=str(examples))
    assert ended.code == 0, ended.said
    assert ended.out.startswith("28 conversations with gold labels")


def test_unusable_gold_is_counted_and_listed_by_line(judged: Site) -> None:
    """The rest is evaluated."""
    lines = [
        *gold_lines(3),
        {"_id": 2, "sentiment": "Negative"},
        {"conversation_number": 30, "sentiment": "Negative"},
        {"_id": 999, "sentiment": "Negative"},
        {"conversation_number": 4, "sentiment": "Angry"},
        {"conversation_number": 5, "sentiment": "negative"},
    ]
    judged.source.update_one({"_id": 30}, {"$set": {"conversation_number": 30.0}})
    gold = write_gold(judged, lines)
    ended = evaluate(judged, "--gold", gold)
    assert ended.code == 0, ended.said
    assert (
        "Not used: 1 label outside the taxonomy, 1 repeated, same label, 1 unknown conversation, 1 no result yet."
        in ended.out
    )
    assert ended.out.index("line 4: ") < ended.out.index("line 5: ") < ended.out.index("line 7: ")
    for line in (
        "line 4: repeated, same label: sentiment, as in line 3",
        "line 5: no result yet: conversation 30",
        "line 6: unknown conversation: 999",
        "line 7: label outside the taxonomy: sentiment Angry",
    ):
        assert line in ended.out
    assert report_of(judged, "--gold", gold)["gold"]["conversations"] == 4


def test_ids_of_all_types_match(place: Site) -> None:
    """ObjectIds as Extended JSON and as text, numbers of each type as text, and conversation numbers."""
    key = ObjectId()
    ids = (key, 2, 3, Int64(4), 5.0)
    place.results.insert_many(
        {**result(number, "Neutral"), "source_conversation_id": one} for number, one in enumerate(ids, 1)
    )
    path = place.folder / "gold.csv"
    rows = (f"{key},", "2,", ",3", "4,", "5,")
    path.write_text("".join(["_id,conversation_number,sentiment\n", *(f"{row},Neutral\n" for row in rows)]))
    assert field_of(report_of(place, "--gold", str(path)), "sentiment")["accuracy"]["n"] == 5
    typed = write_gold(place, [{"_id": {"$oid": str(key)}, "sentiment": "Positive"}])
    assert field_of(report_of(place, "--gold", typed), "sentiment")["accuracy"]["n"] == 1


def test_gold_from_a_collection(judged: Site) -> None:
    """Documents have the form of the lines of a file. Each has an _id, which need not be that of a conversation."""
    lines = [{**line, "_id": ObjectId(), "source_conversation_id": line["_id"]} for line in gold_lines()]
    lines[7] = {"_id": ObjectId(), "conversation_number": "7", "sentiment": "Neutral"}
    judged.database["gold"].insert_many(lines)
    report = report_of(judged, "--gold", "collection:gold")
    assert field_of(report, "sentiment")["n"] == 30
    ended = evaluate(judged, "--gold", "collection:nothing")
    assert ended.code == 2
    assert "collection nothing has no gold labels" in ended.err


def test_corrections_are_gold_and_the_latest_one_counts(judged: Site) -> None:
    """An accepted label is a correction to itself."""
    at = datetime(2026, 11, 29, tzinfo=UTC)

    def correction(number: int, to: str, minute: int) -> Document:
        return {
            "source_conversation_id": number,
            "conversation_number": str(number),
            "field": "sentiment",
            "from": SENTIMENTS[number % 3],
            "to": to,
            "reviewer": "ana",
            "at": at + timedelta(minutes=minute),
        }

    assert evaluate(judged, "--gold", "corrections").code == 1
    judged.database["sentimental_analysis_corrections"].insert_many(
        [
            correction(1, "Neutral", 0),
            correction(2, "Positive", 1),
            correction(2, "Negative", 5),
        ]
    )
    report = report_of(judged, "--gold", "corrections")
    assert field_of(report, "sentiment")["accuracy"] == pytest.approx(
        {"value": 1.0, "low": 0.342, "high": 1.0, "n": 2}, abs=0.001
    )
    assert report["gold"]["problem_counts"] == {"superseded": 1}


def test_control_sample_is_gold_without_the_bias_of_the_queue(judged: Site) -> None:
    """Only corrections with a sampling probability; the others are refused for shares."""
    corrections = [
        {"source_conversation_id": number, "field": "sentiment", "to": SENTIMENTS[number % 3], "at": datetime.now(UTC)}
        for number in range(10)
    ]
    for correction in corrections[:6]:
        correction["sampling_probability"] = 0.1
    judged.database["sentimental_analysis_corrections"].insert_many(corrections)
    report = report_of(judged, "--gold", "control", "--shares")
    assert (report["gold"]["conversations"], report["shares"][0]["n_gold"]) == (6, 6)
    ended = evaluate(judged, "--gold", "corrections")
    assert "10 conversations" in ended.out
    assert "Reviewers see uncertain labels first" in ended.out
    refused = evaluate(judged, "--gold", "corrections", "--shares")
    assert refused.code == 2
    assert "use --gold control" in refused.err


def test_nothing_matched_exits_with_1(judged: Site) -> None:
    """A gold file of another database; the report is written nevertheless."""
    gold = write_gold(judged, [{"_id": "other", "sentiment": "Neutral"}])
    report = report_of(judged, "--gold", gold, code=1)
    assert report["gold"]["problem_counts"] == {"unknown": 1}
    assert "sentimental_analysis for 1 gold line; run python cli.py first" in evaluate(judged, "--gold", gold).err
    both = ("sentimental_analysis", "sentimental_analysis")
    assert "No conversation with a gold label is in both" in evaluate(judged, "--gold", gold, "--compare", *both).err


@pytest.mark.parametrize(("least", "code"), [("0.8", 0), ("0.84", 1)])
def test_fail_under_sets_the_exit_code(judged: Site, least: str, code: int) -> None:
    """For CI and cron."""
    ended = evaluate(judged, "--gold", write_gold(judged, gold_lines()), "--fail-under", f"sentiment={least}")
    assert ended.code == code
    assert ("The accuracy of sentiment is 0.833, below 0.84" in ended.out) is (code == 1)


def test_fail_under_without_gold_of_the_field_fails(judged: Site) -> None:
    """A check of nothing must not pass."""
    ended = evaluate(judged, "--gold", write_gold(judged, gold_lines()), "--fail-under", "topic=0.1")
    assert ended.code == 1
    assert "There is no accuracy of topic" in ended.out


@pytest.mark.slow
def test_compare_two_collections_with_gold(judged: Site) -> None:
    """B corrects the five errors of A and makes a new one: 5 against 1, p = 14 / 64."""
    better = [result(number, gold_lines()[number]["sentiment"], model="m2") for number in range(30)]
    better[1]["classification"]["sentiment"] = "Positive"
    judged.database["second"].insert_many(better[:29])
    gold = write_gold(judged, gold_lines())
    report = report_of(judged, "--compare", "sentimental_analysis", "second", "--gold", gold)
    comparison = report["comparison"]
    (figures,) = [each for each in comparison["fields"] if each["field"] == "sentiment"]
    assert (figures["only_a"], figures["only_b"], figures["p_value"]) == (1, 5, pytest.approx(14 / 64))
    assert figures["accuracy_change"]["value"] == pytest.approx(4 / 29)
    assert figures["accuracy_change"]["low"] < figures["accuracy_change"]["value"] < figures["accuracy_change"]["high"]
    assert (comparison["n"], comparison["missing"], comparison["differing"]) == (29, 1, 6)
    assert [each["id"] for each in comparison["differences"]] == ["0", "1", "6", "12", "18", "24"]
    assert comparison["a"]["models"] == [{"model": "m1", "n": 29}]
    assert comparison["b"]["models"] == [{"model": "m2", "n": 29}]


def test_compare_without_gold_counts_agreement(judged: Site) -> None:
    """Pages of one collection, looked up in the other."""
    same = [result(number, SENTIMENTS[number % 3]) for number in range(30)]
    same[7]["classification"]["sentiment"] = "Negative"
    judged.results.insert_one({"source_conversation_id": "odd", "classification": "x", "processing_metadata": [1]})
    judged.database["second"].insert_many(same)
    page = judged.folder / "report.html"
    ended = evaluate(judged, "--compare", "sentimental_analysis", "second", "--html", str(page))
    assert ended.code == 0, ended.said
    assert "<td>Neutral</td><td>Negative</td>" in page.read_text()
    assert "30 were labelled with the same model, prompt and options" in ended.out
    assert ".97 (.83–.99)" in ended.out
    assert "1 conversation with different labels" in ended.out
    assert "Paired test" not in ended.out


def test_long_comparison_shows_its_progress(judged: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every few seconds; here after each page."""
    from evaluation import actions

    monkeypatch.setattr(actions, "LINE_EVERY_S", 0.0)
    ended = evaluate(judged, "--compare", "sentimental_analysis", "sentimental_analysis")
    assert "evaluate: 30 conversations of sentimental_analysis compared" in ended.err


def test_compare_two_reports_uses_their_gold(judged: Site) -> None:
    """Two runs of evaluate, each with --output: neither collection is needed any more."""
    gold = write_gold(judged, gold_lines())
    first, second = str(judged.folder / "a.json"), str(judged.folder / "b.json")
    assert evaluate(judged, "--gold", gold, "--output", first).code == 0
    judged.results.update_many(
        {}, {"$set": {"classification.sentiment": "Negative", "processing_metadata.model_used": "m2"}}
    )
    assert evaluate(judged, "--gold", gold, "--output", second).code == 0
    judged.results.drop()
    comparison = report_of(judged, "--compare", first, second)["comparison"]
    (figures,) = [each for each in comparison["fields"] if each["field"] == "sentiment"]
    assert (figures["only_a"], figures["only_b"]) == (15, 5)
    assert [each["gold"] for each in comparison["differences"][:2]] == [["Negative"], ["Neutral"]]


def test_shares_use_gold_and_all_results(judged: Site) -> None:
    """12 gold labels, 30 results: the model's Positive is a third, and half of it is wrong."""
    report = report_of(judged, "--gold", write_gold(judged, gold_lines(12)), "--shares")
    (shares,) = report["shares"]
    assert (shares["n_gold"], shares["n_model"]) == (12, 30)
    positive = shares["labels"][0]
    assert positive["label"] == "Positive"
    assert positive["model"] == pytest.approx(1 / 3)
    assert positive["gold"]["value"] == pytest.approx(2 / 12)
    assert positive["combined"]["low"] < positive["combined"]["value"] < positive["model"]
    assert "drawn at random" in evaluate(judged, "--gold", write_gold(judged, gold_lines(12)), "--shares").out


def test_field_with_several_labels_is_judged_label_by_label(judged: Site) -> None:
    """Lists in the results and in gold, in any order; in CSV with bars."""
    taxonomy = judged.folder / "labels.yaml"
    taxonomy.write_text(
        "fields:\n  parts:\n    labels: [Other, Account/Billing, Shipping/Delivery]\n    multiple: true\n"
    )
    judged.settings["TAXONOMY_FILE"] = str(taxonomy)
    judged.results.update_many({}, {"$set": {"classification.parts": ["Other", "Account/Billing"]}})
    path = judged.folder / "gold.csv"
    path.write_text("_id,parts\n1,account/billing|Other\n2,Other\n3,Shipping/Delivery|Other\n")
    report = report_of(judged, "--gold", str(path), "--shares")
    figures = field_of(report, "parts")
    assert (figures["is_multi"], figures["accuracy"]["value"]) == (True, pytest.approx(1 / 3))
    by_label = {each["label"]: each for each in figures["labels"]}
    assert by_label["Other"]["f1"]["value"] == 1
    assert by_label["Account/Billing"]["precision"]["value"] == pytest.approx(1 / 3)
    shares = {each["label"]: each for each in report["shares"][0]["labels"]}
    assert (shares["Other"]["model"], shares["Account/Billing"]["gold"]["value"]) == (1, pytest.approx(1 / 3))


def test_page_is_self_contained_and_escaped(judged: Site) -> None:
    """A label of another program may hold markup."""
    judged.results.update_one(
        {"source_conversation_id": 1}, {"$set": {"classification.sentiment": "<script>alert(1)</script>"}}
    )
    page = judged.folder / "report.html"
    assert evaluate(judged, "--gold", write_gold(judged, gold_lines()), "--shares", "--html", str(page)).code == 0
    text = page.read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "requires --gold SOURCE"),
        (["--compare", "a", "b", "--shares"], "leave out --compare"),
        (["--gold", "g", "--run-into", "x"], "--run-into requires --run N"),
        (["--gold", "g", "--shares", "--run", "3"], "leave out one of them"),
        (["--gold", "g", "--fail-under", "mood=0.5"], "the fields are intent, topic, sentiment"),
        (["--compare", "nowhere", "b"], "--compare nowhere: there is no such file, and no collection with results"),
        (["--gold", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--gold", "g", "--html", "no/such/folder/page.html"], "--html"),
        (["--gold", "g", "--fail-under", "intent=80"], "FIELD=SHARE"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(place: Site, flags: list[str], message: str) -> None:
    """Exit code 2."""
    ended = evaluate(place, *flags)
    assert ended.code == 2
    assert message in ended.err


def test_file_that_is_no_report_is_refused(place: Site) -> None:
    """Any other JSON file."""
    (place.folder / "x.json").write_text('{"conversations": [{"_id": 1}]}')
    ended = evaluate(place, "--compare", "x.json", "x.json")
    assert ended.code == 2
    assert "is not a report of evaluate" in ended.err


def test_missing_packages_are_named_with_their_file(place: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, exit code 2."""
    found: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    ended = evaluate(place, "--gold", "gold.jsonl")
    assert ended.code == 2
    assert "scipy" in ended.err
    assert f"{sys.executable} -m pip install -r requirements-evaluation.txt" in ended.err


def labels_by_the_model(document: Document) -> Document:
    taxonomy = load_taxonomy()
    message = chat_messages("", aggregate_conversation(document).transcript)[-1]["content"]
    enums = [taxonomy.names(name) for name in ("intent", "topic", "sentiment")]
    return expected_labels(message, *enums)


@pytest.fixture
def to_classify(site: Site) -> Site:
    """Return a site with 12 conversations of any status and gold labels: those that the model will give."""
    documents = [conversation(number, status="processed") for number in range(12)]
    site.source.insert_many(documents)
    write_gold(site, [{"_id": one["_id"], "gold": labels_by_the_model(one)} for one in documents])
    return site


def test_run_classifies_gold_conversations_into_a_collection_of_its_own(to_classify: Site) -> None:
    """The source, its leases and the results of the worker are untouched."""
    site = to_classify
    before = list(site.source.find())
    report = report_of(site, "--gold", "gold.jsonl", "--run", "8")
    assert [field_of(report, name)["accuracy"]["value"] for name in ("intent", "topic", "sentiment")] == [1, 1, 1]
    assert report["gold"]["conversations"] == 8
    assert report["models"] == [{"model": "llama3.2", "n": 8}]
    assert list(site.source.find()) == before
    collections = set(site.database.list_collection_names())
    assert collections == {"conversation_set", "sentimental_analysis_evaluation", "model_windows"}
    assert site.database["sentimental_analysis_evaluation"].count_documents({}) == 8
    assert site.files() == []


def test_run_again_asks_only_for_what_is_missing(to_classify: Site) -> None:
    """The same model, prompt and options: the second run adds four conversations to the first eight."""
    site = to_classify
    for number, asked in ((8, 8), (12, 12), (8, 12)):
        assert report_of(site, "--gold", "gold.jsonl", "--run", str(number))["gold"]["conversations"] == number
        assert requests(site) == asked


def test_run_of_another_model_replaces_the_results(to_classify: Site) -> None:
    """Its figures never mix two models."""
    site = to_classify
    report_of(site, "--gold", "gold.jsonl", "--run", "6")
    report = report_of(site, "--gold", "gold.jsonl", "--run", "6", "--model", "qwen3:8b")
    assert report["models"] == [{"model": "qwen3:8b", "n": 6}]
    assert requests(site) == 12
    report = report_of(site, "--gold", "gold.jsonl", "--run", "6", "--run-into", "third")
    assert site.database["third"].count_documents({}) == 6


def test_conversations_that_cannot_be_classified_are_listed(to_classify: Site) -> None:
    """One without a customer, one whose answers are unusable; an older result of it does not count."""
    site = to_classify
    report_of(site, "--gold", "gold.jsonl", "--run", "12")
    site.source.update_one({"_id": 3}, {"$set": {"messages": [{"sender": "agent", "text": "Anything else?"}]}})
    site.source.update_one({"_id": 4}, {"$set": {"messages.0.text": "Case 00004: unusable"}})
    model_of(site).configure(faults=[{"kind": "unconstrained", "when": {"text": "unusable"}}])
    report = report_of(site, "--gold", "gold.jsonl", "--run", "12")
    assert report["gold"]["conversations"] == 10
    problems = {one["place"]: one for one in report["gold"]["problems"]}
    assert problems["3"]["kind"] == "skipped"
    assert problems["4"]["kind"] == "failed"
    assert problems["4"]["detail"].startswith("not_json")


def test_run_without_a_model_server_exits_with_3(to_classify: Site) -> None:
    """The sentence is that of a run."""
    ended = evaluate(to_classify, "--gold", "gold.jsonl", "--run", "3", "--ollama-endpoint", "http://127.0.0.1:9")
    assert ended.code == 3


@pytest.mark.parametrize("name", ["conversation_set", "sentimental_analysis", "sentimental_analysis_corrections"])
def test_run_never_writes_into_the_collections_of_the_worker(to_classify: Site, name: str) -> None:
    """Not even if asked to."""
    ended = evaluate(to_classify, "--gold", "gold.jsonl", "--run", "3", "--run-into", name)
    assert ended.code == 2
    assert "is a collection of the worker" in ended.err
    assert requests(to_classify) == 0
    assert to_classify.results.count_documents({}) == 0


def test_run_requires_a_fixed_concurrency(to_classify: Site) -> None:
    """As an estimate does."""
    ended = evaluate(to_classify, "--gold", "gold.jsonl", "--run", "3", "--max-concurrent", "auto")
    assert ended.code == 2
    assert "--run requires a fixed concurrency; set --max-concurrent to a number." in ended.err


def test_run_reports_its_progress(to_classify: Site) -> None:
    """Plain lines where there is no terminal."""
    ended = evaluate(to_classify, "--gold", "gold.jsonl", "--run", "12")
    assert "evaluation completed: 12/12 done, 12 ok" in ended.err


def test_interrupted_run_keeps_its_results_and_resumes(to_classify: Site) -> None:
    """After Ctrl-C, the same command classifies the rest; at most the calls in flight are repeated."""
    site = to_classify
    model_of(site).configure(latency_s=0.1)
    fresh = site.database["sentimental_analysis_evaluation"]
    flags = ("evaluate", "--gold", str(site.folder / "gold.jsonl"), "--run", "12", "--max-concurrent", "1")
    with site.start(*flags) as worker:
        until(lambda: fresh.count_documents({}) >= 2)
        worker.send(signal.SIGINT)
        assert worker.ended().code == 130
    kept = fresh.count_documents({})
    assert 2 <= kept < 12
    assert report_of(site, *flags[1:])["gold"]["conversations"] == 12
    assert 12 <= requests(site) <= 13
