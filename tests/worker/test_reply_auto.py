"""``--reply auto``: the shortest style that agrees with full, or loses nothing against gold, measured once."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from config import load_settings, load_taxonomy
from evaluation.intervals import lower_bound
from evaluation.style_choice import LEAST_AGREEMENT, LEAST_SAMPLE, loses_nothing
from evaluation.values import Estimate
from model_server.models import chat_target
from tests.worker.site import Site, filled, requests
from worker.reply_choice import FILE, MOST_KEPT, classifier_for, store_choice, stored_choice

MANY = 62  # conversations, a few more than the fewest


def chosen(site: Site) -> dict[str, Any]:
    [entry] = orjson.loads((site.directory / FILE).read_bytes()).values()
    return dict(entry)


def has_sentences(site: Site) -> set[bool]:
    return {"categorization" in result["classification"] for result in site.results.find()}


def test_shortest_style_is_measured_once(site: Site) -> None:
    filled(site, MANY)
    ended = site.run("--reply", "auto")
    assert ended.code == 0, ended.err
    assert f"reply style list: agrees with full in {MANY} of {MANY} conversations (lower bound 0.953)" in ended.err
    assert "reply style auto: list, until the model, the prompt or the taxonomy changes." in ended.err
    assert chosen(site)["style"] == "list"
    assert "labels" not in chosen(site)
    assert has_sentences(site) == {False}
    count = requests(site)
    assert count == 3 * MANY
    filled(site, 5, first=MANY)
    assert "reply style auto: list, as measured before." in site.run("--reply", "auto").err
    assert requests(site) == count + 5
    assert f"done         {MANY + 5}" in site.run("plan", REPLY_STYLE="auto").out
    assert site.run("--reply", "auto").code == 0  # nothing is pending
    assert requests(site) == count + 5


def test_style_that_differs_is_not_used(site: Site) -> None:
    """A trial that is lost ends early; the next longer style is tried."""
    assert site.model is not None
    site.model.configure(array_noise=0.3)
    filled(site, MANY)
    ended = site.run("--reply", "auto")
    assert ended.code == 0, ended.err
    assert chosen(site)["style"] == "labels"
    asked = requests(site) - 3 * MANY  # the others were asked for in full, for labels, and by the run
    assert asked < MANY / 2
    [counts] = re.findall(r"reply style list: agrees with full in (\d+) of (\d+) conversations", ended.err)
    assert 0 < int(counts[0]) < int(counts[1]) == asked  # those that were never asked do not count as different
    [result] = site.results.find().limit(1)
    assert "categorization" not in result["classification"]


@pytest.mark.thorough
def test_other_model_is_measured_again(site: Site) -> None:
    assert site.model is not None
    filled(site, MANY)
    assert site.run("--reply", "auto").code == 0
    count = requests(site)
    assert site.run("--reply", "auto", "--only", "stale", "--model", "qwen3:8b").code == 0
    assert requests(site) == count + 3 * MANY
    assert len(orjson.loads((site.directory / FILE).read_bytes())) == 2


def test_model_that_goes_away_is_no_style_that_was_measured(site: Site) -> None:
    """The choice would be full, for as long as the model and the prompt stay the same."""
    assert site.model is not None
    site.model.configure(faults=[{"kind": "model_not_found_404", "when": {"text": "Case"}}])
    filled(site, MANY)
    ended = site.run("--reply", "auto")
    assert ended.code == 3
    assert "has no model llama3.2" in ended.err
    assert not (site.directory / FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "code"), [(1, 0), (30, 3)])
def test_lost_call_does_not_lose_the_measurement(site: Site, lost: int, code: int) -> None:
    """It says nothing about a style. Many say nothing about any."""
    assert site.model is not None
    site.model.configure(faults=[{"kind": "busy_503", "when": {"text": "Case"}, "times": lost}])
    filled(site, MANY)
    ended = site.run("--reply", "auto", LLM_MAX_ATTEMPTS="1")
    assert ended.code == code, ended.err
    assert (site.directory / FILE).exists() is not code
    if not code:
        assert f"agrees with full in {MANY - 1} of {MANY - 1} conversations" in ended.err


def test_nothing_is_measured_if_nothing_of_the_subset_is_pending(site: Site) -> None:
    filled(site, MANY)
    ended = site.run("--reply", "auto", "--filter", '{"channel": "fax"}')
    assert ended.code == 0, ended.err
    assert requests(site) == 0
    wrong = site.run("--reply", "auto", "--filter", '{"channel": {"$fax": 1}}')
    assert wrong.code == 2
    assert "--filter is not a query" in wrong.err


def test_too_few_conversations_keep_full(site: Site) -> None:
    filled(site, 10)
    ended = site.run("--reply", "auto")
    assert "reply style auto: full; 10 conversations are too few" in ended.err
    assert not (site.directory / FILE).exists()
    assert has_sentences(site) == {True}
    assert requests(site) == 10


@pytest.mark.thorough
def test_server_without_arrays_is_asked_for_labels(site: Site) -> None:
    assert site.model is not None
    site.model.configure(refuses_arrays=True)
    filled(site, MANY)
    ended = site.run("--reply", "auto")
    assert "reply style list: the server takes no arrays." in ended.err
    assert chosen(site)["style"] == "labels"


@pytest.mark.thorough
def test_style_that_is_right_more_often_is_used(site: Site) -> None:
    """It differs from full, and reviewers agree with it."""
    assert site.model is not None
    site.model.configure(array_noise=0.3)
    filled(site, MANY)
    assert site.run("--reply", "list").code == 0
    site.database.get_collection("sentimental_analysis_corrections").insert_many(
        {
            "source_conversation_id": result["source_conversation_id"],
            "field": field,
            "from": None,
            "to": result["classification"][field],
            "at": datetime.now(UTC),
        }
        for result in list(site.results.find())
        for field in ("intent", "topic", "sentiment")
    )
    ended = site.run("--reply", "auto", "--reprocess")
    assert ended.code == 0, ended.err
    assert f"against {MANY} reviewed conversations +0." in ended.err
    assert chosen(site)["style"] == "list"


@pytest.mark.slow
def test_least_sample_is_the_smallest_that_can_reach_the_bound() -> None:
    assert lower_bound(LEAST_SAMPLE, LEAST_SAMPLE) >= LEAST_AGREEMENT > lower_bound(LEAST_SAMPLE - 1, LEAST_SAMPLE - 1)


@pytest.mark.parametrize(
    ("change", "is_good"),
    [
        (Estimate(0.0, -0.04, 0.04, 200), True),
        (Estimate(0.02, -0.06, 0.1, 200), False),
        (Estimate(-0.01, -0.03, 0.01, 200), False),
        (Estimate(0.5, 0.2, 0.8, 20), False),
        (Estimate(None, None, None, 0), False),
    ],
)
def test_loss_against_gold(change: Estimate, *, is_good: bool) -> None:
    assert loses_nothing(change) is is_good


def test_choice_belongs_to_its_plan_and_a_damaged_file_is_no_choice(tmp_path: Path) -> None:
    for number in range(MOST_KEPT + 1):
        store_choice(tmp_path, f"plan {number}", {"style": "list"})
    assert stored_choice(tmp_path, "plan 0") is None
    assert stored_choice(tmp_path, "plan 1") == "list"
    store_choice(tmp_path, "odd", {"style": "codes"})
    assert stored_choice(tmp_path, "odd") is None
    (tmp_path / FILE).write_bytes(b'{"plan 1": {"sty')
    assert stored_choice(tmp_path, "plan 1") is None


def test_service_and_scripts_read_the_stored_choice(tmp_path: Path) -> None:
    settings = load_settings(None, ollama_model="llama3.2", reply_style="auto", batch_files_dir=tmp_path)
    target = chat_target(settings, "llama3.2")
    full = classifier_for(settings, target)
    assert full.reply_style == "full"
    store_choice(tmp_path, full.plan(target), {"style": "labels"})
    assert classifier_for(settings, target, load_taxonomy()).reply_style == "labels"
