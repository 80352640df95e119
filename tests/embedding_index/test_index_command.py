"""``cli.py index``: every action as a real process, against the fake OpenAI and a real SQLite database."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from genai_prices import Usage, calc_price

from embedding_index.providers.openai_embeddings import openai_counter
from embedding_index.report import in_dollars
from tests.embedding_index.index_commands import KEY, RELATIONSHIPS, ROOT, TABLES, IndexSite

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bpe_openai") is None, reason="requirements-index.txt is not installed"
)
ITEMS = TABLES + RELATIONSHIPS


def test_only_new_and_changed_items_are_sent(site: IndexSite) -> None:
    """New, unchanged, changed and dropped tables: their cost, and what a search finds afterwards."""
    first = site.run("--batch", "--json")
    assert first.code == 0, first.err
    facts = first.json
    assert (facts["indexed"], facts["failed"], facts["success_rate"], facts["calls"]) == (ITEMS, 0, 1.0, 2)
    assert (facts["provider"], facts["model"], facts["dimensions"]) == ("openai", "text-embedding-3-small", 1536)
    assert facts["tables"] == dict.fromkeys(("customers", "orders", "refunds", "shipments"), True)
    assert set(facts["relationships"].values()) == {True}
    assert len(facts["relationships"]) == RELATIONSHIPS
    assert facts["states"]["table"] == {"pending": 0, "indexed": TABLES, "failed": 0}
    assert facts["tokens"] > 0
    assert facts["cost_usd"] == pytest.approx(facts["tokens"] * 0.02 / 1e6)
    assert facts["items_per_s"] > 0
    assert site.calls == 2

    again = site.run("--batch", "--json")
    assert (again.code, again.json["indexed"], again.json["calls"], site.calls) == (0, 0, 0, 2), again.err
    assert again.json["all_runs"] == {"calls": 2, "tokens": facts["tokens"], "cost_usd": facts["cost_usd"]}

    site.change("ALTER TABLE refunds ADD COLUMN reason TEXT", "DROP TABLE shipments")
    changed = site.run("--batch", "--json")
    assert (changed.code, changed.json["calls"], changed.json["removed"]) == (0, 1, 2), changed.err
    # The text of orders says who refers to it.
    assert set(changed.json["tables"]) == {"refunds", "orders"}
    hits = site.run("--search", "shipments of a carrier", "--limit", "50", "--json").json
    assert {hit["name"] for hit in hits if hit["kind"] == "table"} == {"customers", "orders", "refunds"}
    assert "reason" in next(hit["text"] for hit in hits if hit["name"] == "refunds")

    site.change("CREATE TABLE shipments (id INTEGER PRIMARY KEY, order_id INTEGER REFERENCES orders(id), carrier TEXT)")
    calls = site.calls
    back = site.run("--batch", "--json").json
    assert (back["indexed"] > 0, back["reused"] > 0, site.calls) == (True, True, calls + back["calls"])
    assert back["tables"]["shipments"]


def test_individual_sends_one_text_in_each_call(site: IndexSite) -> None:
    """There are as many calls as texts."""
    ended = site.run("--individual")
    assert ended.code == 0, ended.err
    assert site.calls == ITEMS
    assert f"{ITEMS} calls, " in ended.out


def test_the_batch_size_of_the_environment_counts(site: IndexSite) -> None:
    """One call has two tables, the next one two relationships."""
    estimate = site.run("--estimate-costs", "--json", EMBEDDING_BATCH_SIZE="2").json
    ended = site.run("--batch", "--json", EMBEDDING_BATCH_SIZE="2").json
    assert (ended["calls"], site.calls, estimate["estimated_batches"], estimate["batch_size"]) == (4, 4, 4, 2)


def test_the_estimate_is_the_price_and_sends_nothing(site: IndexSite) -> None:
    """The estimate is the price of the tokens by OpenAI's tokenizer; after the run it is 0."""
    output = site.folder / "estimate.json"
    ended = site.run("--estimate-costs", "--json", "--output", str(output))
    assert (ended.code, site.calls) == (0, 0), ended.err
    count = openai_counter("text-embedding-3-small")
    assert count is not None
    tokens = sum(map(count, site.texts()))
    usd = float(calc_price(Usage(input_tokens=tokens), "text-embedding-3-small", provider_id="openai").total_price)
    facts = ended.json
    assert json.loads(output.read_text()) == facts
    assert facts["estimated_tokens"] == tokens > 50
    assert facts["total_estimated_cost"] == pytest.approx(usd) == pytest.approx(tokens * 0.02 / 1e6)
    assert facts["total_estimated_cost"] == facts["estimated_table_cost"] + facts["estimated_relationship_cost"]
    assert (facts["pending_tables"], facts["pending_relationships"], facts["total_pending"]) == (4, 3, 7)
    assert (facts["batch_size"], facts["estimated_batches"]) == (100, 2)
    shown = site.run("--estimate-costs").out
    assert f"About {tokens:,} tokens for text-embedding-3-small of openai" in shown
    assert "Nothing was sent." in shown
    assert site.calls == 0
    assert site.run("--batch").code == 0
    site.change("ALTER TABLE customers ADD COLUMN city TEXT")
    after = site.run("--estimate-costs", "--json").json
    assert after["pending_tables"] == 1
    assert 0 < after["estimated_tokens"] < tokens / 3


def test_a_limit_of_the_price(site: IndexSite) -> None:
    """Below it the run continues; above it nothing is sent without a terminal; ``--yes`` spends it."""
    over = site.run("--batch", "--max-cost", "0.000001")
    assert (over.code, site.calls) == (2, 0)
    assert "Nothing was sent: 0.0000" in over.err
    assert "raise --max-cost, or give --yes" in over.err
    unknown = site.run("--batch", "--max-cost", "5", EMBEDDING_MODEL="our-own-model")
    assert (unknown.code, site.calls) == (2, 0)
    assert "price unknown" in unknown.err
    assert site.run("--batch", "--max-cost", "0.01").code == 0
    calls = site.calls
    site.change("ALTER TABLE customers ADD COLUMN city TEXT")
    assert site.run("--batch", "--max-cost", "0", "--yes").code == 0
    assert site.calls == calls + 1
    assert site.run("--batch", "--max-cost", "0").code == 0, "nothing is to be paid"


def test_nothing_to_pay_is_no_unknown_price(site: IndexSite) -> None:
    """That also holds for a model without a known price."""
    assert site.run("--batch", "--max-cost", "5", "--yes", EMBEDDING_MODEL="our-own-model").code == 0
    calls = site.calls
    again = site.run("--batch", "--max-cost", "0", EMBEDDING_MODEL="our-own-model")
    assert (again.code, site.calls) == (0, calls), again.err


def test_rebuild_with_the_same_model_makes_no_call(site: IndexSite) -> None:
    """No call is made, because the vectors are stored."""
    assert site.run("--batch").code == 0
    calls = site.calls
    rebuilt = site.run("--rebuild", "--json")
    assert (rebuilt.code, rebuilt.json["calls"], site.calls) == (0, 0, calls), rebuilt.err
    assert "rebuilt from the stored vectors" in rebuilt.err
    assert len(site.run("--search", "refunds", "--limit", "50", "--json").json) == ITEMS
    assert site.calls == calls + 1, "only the search was a call"


@pytest.mark.slow
def test_large_index_is_searched_through_a_graph_that_can_be_lost(
    site: IndexSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches find everything without it, and the next run builds it without a call."""
    monkeypatch.setattr("embedding_index.search_graph.EXACT_UP_TO_BYTES", 0)
    assert site.run("--batch").code == 0
    hits = site.run("--search", "refunds", "--json").json
    calls = site.calls
    shutil.rmtree(site.index / "chroma")
    assert site.run("--search", "refunds", "--json").json == hits
    assert site.run("--batch").code == 0
    assert site.calls == calls + 1, "only the search was a call"
    assert len(list((site.index / "chroma").iterdir())) == 1
    assert site.run("--search", "refunds", "--json").json == hits


def test_another_model(site: IndexSite) -> None:
    """It is refused with the remedy; an estimate is possible; too high a price changes nothing; --rebuild embeds everything."""
    assert site.run("--batch").code == 0
    other = {"EMBEDDING_MODEL": "text-embedding-3-large"}
    calls = site.calls
    for flags in (["--batch"], ["--search", "refunds"]):
        refused = site.run(*flags, **other)
        assert refused.code == 2
        for part in ("text-embedding-3-small", "text-embedding-3-large", "--rebuild"):
            assert part in refused.err
    estimate = site.run("--estimate-costs", "--json", **other)
    assert (estimate.code, estimate.json["total_pending"]) == (0, ITEMS)
    assert estimate.json["total_estimated_cost"] == pytest.approx(estimate.json["estimated_tokens"] * 0.13 / 1e6)
    assert site.run("--rebuild", "--max-cost", "0", **other).code == 2
    assert site.calls == calls
    assert site.states() == {"indexed": ITEMS}
    assert site.run("--search", "refunds").code == 0, "the index that there is was kept"
    rebuilt = site.run("--rebuild", "--json", **other)
    assert (rebuilt.code, rebuilt.json["indexed"], rebuilt.json["dimensions"]) == (0, ITEMS, 3072)
    assert site.run("--search", "refunds", **other).code == 0
    calls = site.calls
    back = site.run("--rebuild", "--json")
    assert (back.code, back.json["calls"], site.calls) == (0, 0, calls), "the first model's vectors are still stored"


@pytest.mark.thorough
def test_states_that_are_lost_cost_nothing(site: IndexSite) -> None:
    """Tables that were dropped meanwhile are not found afterwards."""
    assert site.run("--batch").code == 0
    calls = site.calls
    for path in site.index.glob("index.sqlite3*"):
        path.unlink()
    site.change("DROP TABLE shipments")
    ended = site.run("--batch", "--json")
    assert ended.code == 0, ended.err
    # Of orders the text has changed: it says who refers to it.
    assert site.calls - calls == ended.json["calls"] == 1
    names = {hit["name"] for hit in site.run("--search", "shipments", "--limit", "50", "--json").json}
    assert not [name for name in names if name.startswith("shipments")]


def test_search_as_json_and_as_a_table(site: IndexSite) -> None:
    """Hits are in order, with their metadata; an empty index has none."""
    empty = site.run("--search", "refunds")
    assert empty.code == 2
    assert "there is no index in" in empty.err
    assert "index --batch" in empty.err
    assert site.run("--batch").code == 0
    output = site.folder / "hits.json"
    hits = site.run("--search", "refunds", "--json", "--limit", "2", "--output", str(output))
    assert len(hits.json) == 2
    assert json.loads(output.read_text()) == hits.json
    assert {"kind", "name", "similarity", "text"} <= set(hits.json[0])
    assert hits.json[0]["similarity"] >= hits.json[1]["similarity"]
    assert len(site.run("--search", "refunds", "--json").json) == 5
    table = site.run("--search", "refunds").out
    assert table.split()[:4] == ["like", "what", "name", "about"]
    assert max(map(len, table.splitlines())) <= 120
    none = site.run("--search", "refunds", "--source", "conversations")
    assert none.code == 0, none.err
    assert "run cli.py index --batch --source conversations first" in none.out
    assert site.run("--search", "refunds", "--source", "conversations", "--json").json == []
    nothing = site.run("--search", " ")
    assert nothing.code == 2
    assert "empty" in nothing.err


@pytest.mark.thorough
def test_the_local_model_finds_refunds_first(site: IndexSite) -> None:
    """The sample database has a separate index and needs no server."""
    local = {"EMBEDDING_PROVIDER": "local"}
    ended = site.run("--batch", "--sample", "--json", **local)
    assert (ended.code, ended.json["failed"], ended.json["cost_usd"]) == (0, 0, 0.0), ended.err
    assert (site.folder / "data/embedded/index/vectors.sqlite3").exists()
    hit = site.run("--search", "where are refunds stored", "--sample", "--limit", "1", "--json", **local).json[0]
    assert (hit["kind"], hit["name"]) == ("table", "refunds")
    assert site.calls == 0
    assert not site.index.exists()


def test_flags_win_over_the_environment(site: IndexSite) -> None:
    """Provider, model and folder can be given as flags."""
    flags = ("--provider", "openai", "--embedding-model", "text-embedding-3-large", "--index-dir", "elsewhere")
    ended = site.run("--batch", "--json", *flags, EMBEDDING_PROVIDER="ollama")
    assert (ended.code, ended.json["model"]) == (0, "text-embedding-3-large"), ended.err
    assert (site.folder / "elsewhere/vectors.sqlite3").exists()
    assert not site.index.exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "--limit", "3"],
        ["--batch", "--sample", "--source", "conversations"],
        ["--search", "x", "--max-cost", "1"],
        ["--batch", "--allow-external"],
        ["--batch", "--rebuild"],
        ["--limit", "3"],
    ],
    ids=" ".join,
)
def test_a_flag_that_would_do_nothing_is_refused(site: IndexSite, flags: list[str]) -> None:
    """The exit code is 2, and no file was made."""
    ended = site.run(*flags)
    assert ended.code == 2
    assert flags[-2].removeprefix("conversations") in ended.err or "required" in ended.err or flags[-1] in ended.err
    assert not site.index.exists()


def test_secrets_and_texts_are_in_no_output_and_no_log(site: IndexSite) -> None:
    """That holds with --verbose, too; the log file has the lines that stderr does not show."""
    site.change("CREATE TABLE oddments (id INTEGER PRIMARY KEY, canary_of_a_text TEXT)")
    log = site.folder / "logs/index.log"
    for flags in (["--batch", "--verbose"], ["--batch"], ["--rebuild", "--verbose"]):
        ended = site.run(*flags, LOG_FILE=str(log))
        assert ended.code == 0, ended.err
        assert KEY not in ended.said
        assert "canary_of_a_text" not in ended.said
        assert (" - INFO - " in ended.err) == ("--verbose" in flags)
    lines = log.read_text()
    assert lines
    assert KEY not in lines
    assert "canary_of_a_text" not in lines
    assert "rebuilt from the stored vectors" in lines
    assert f"{ITEMS + 1} items indexed, 0 failed" in lines
    assert KEY.encode() not in site.files()
    unwritable = site.run("--batch", LOG_FILE=str(site.database / "index.log"))
    assert unwritable.code == 2
    assert "LOG_FILE" in unwritable.err


@pytest.mark.thorough
def test_without_a_warning_in_an_interpreter_of_its_own(site: IndexSite) -> None:
    """The test turns every warning into an error."""
    for flags in (["--batch"], ["--search", "refunds"]):
        done = subprocess.run(
            [sys.executable, "-W", "error", str(ROOT / "cli.py"), "index", "--provider", "local", *flags],
            env=site.environment, cwd=site.folder, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    assert os.stat(site.index).st_mode & 0o777 == 0o700


def test_price_in_a_message_is_not_rounded_to_cents() -> None:
    """0.01 would not be more than a --max-cost of 0.012."""
    assert [in_dollars(usd) for usd in (None, 0.0, 0.0149, 0.00003)] == [
        "price unknown",
        "free",
        "0.0149 US dollars",
        "0.000030 US dollars",
    ]
