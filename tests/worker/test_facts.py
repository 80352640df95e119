"""``--only facts``: results of the version before get the facts of their conversation, without a model."""

from __future__ import annotations

import json
from typing import Any

from tests.worker.site import Site, conversation, filled, requests


def filling(site: Site, *flags: str, **settings: str) -> dict[str, Any]:
    ended = site.run("--only", "facts", *flags, **settings)
    assert ended.code == 0, ended.err
    return dict(json.loads(ended.out))


def without_facts(site: Site) -> None:
    site.results.update_many({}, {"$unset": {"conversation": 1}})


def test_results_of_the_version_before_are_filled_without_a_model(site: Site) -> None:
    """They are as a run stores them, nothing else changes, and a second command finds nothing to do."""
    filled(site, 120)
    assert site.run().code == 0
    before, asked = list(site.results.find().sort("_id", 1)), requests(site)
    assert all(result["conversation"]["turns"] for result in before)
    without_facts(site)
    assert filling(site, "--dry-run")["results_without_facts"] == 120
    assert site.results.count_documents({"conversation": None}) == 120
    counts = {"results_without_facts": 120, "filled": 120, "source_is_gone": 0, "nothing_to_read": 0}
    assert filling(site) == counts
    assert list(site.results.find().sort("_id", 1)) == before
    assert filling(site) == dict.fromkeys(counts, 0)
    assert requests(site) == asked


def test_filling_goes_on_where_it_was_interrupted(site: Site) -> None:
    """What is filled is not read again."""
    filled(site, 7)
    assert site.run().code == 0
    without_facts(site)
    assert filling(site, "--limit", "3")["filled"] == 3
    assert filling(site)["filled"] == 4


def test_results_whose_document_is_gone_or_empty_are_counted(site: Site) -> None:
    """They are left as they are, and do not hold the others."""
    filled(site, 4)
    assert site.run().code == 0
    without_facts(site)
    site.source.delete_one({"_id": 0})
    site.source.update_one({"_id": 1}, {"$set": {"messages": []}})
    counts = {"results_without_facts": 4, "filled": 2, "source_is_gone": 1, "nothing_to_read": 1}
    assert filling(site) == counts
    assert site.results.count_documents({"conversation": None}) == 2


def test_fields_of_result_metadata_are_filled(site: Site) -> None:
    site.source.insert_one(conversation(1, channel="web", metadata={"priority": "high"}))
    assert site.run().code == 0
    without_facts(site)
    filling(site, RESULT_METADATA="priority")
    facts = site.results.find_one({})["conversation"]
    assert (facts["metadata"], facts.get("channel")) == ({"priority": "high"}, None)
