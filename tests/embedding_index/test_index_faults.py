"""``cli.py index`` where something is missing, wrong, away or in the way: one sentence, a remedy, the right exit code."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys

import pytest

from tests.embedding_index.index_commands import (
    CALLS,
    KEY,
    RELATIONSHIPS,
    ROOT,
    TABLES,
    Ended,
    IndexSite,
    until,
)
from tests.fakes.fake_ollama import FakeOllama
from tests.forked_process import ForkedProcess

ITEMS = TABLES + RELATIONSHIPS
# A finder before all others makes packages look as if they were not installed.
WITHOUT = """
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names!r} else find(name, package)
sys.argv = [{script!r}, 'index', *{flags!r}]
sys.path[0] = {root!r}
runpy.run_path({script!r}, run_name='__main__')
"""


def sentence(ended: Ended, code: int) -> str:
    """Return the only line of stderr."""
    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    return ended.err.strip().splitlines()[-1]


def said_by(process: ForkedProcess) -> str:
    """Return what a running command wrote to stderr until now."""
    assert process.files is not None
    return process.files[1].read_text()


def without(site: IndexSite, names: tuple[str, ...], *flags: str) -> Ended:
    """Run the command as if the packages *names* were not installed."""
    program = WITHOUT.format(names=names, flags=list(flags), script=str(ROOT / "cli.py"), root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=site.environment, cwd=site.folder, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "remedy"),
    [
        ("chromadb", ["--batch"], "requirements-index.txt"),
        pytest.param("numpy", ["--search", "x"], "requirements-index.txt", marks=pytest.mark.thorough),
        pytest.param("sqlalchemy", ["--batch"], "requirements-index.txt", marks=pytest.mark.thorough),
        pytest.param(
            "tokenizers", ["--batch", "--provider", "local"], "requirements-index.txt", marks=pytest.mark.thorough
        ),
        pytest.param("psycopg", ["--batch"], "requirements-index.txt", marks=pytest.mark.thorough),
    ],
)
def test_a_missing_package_is_named(site: IndexSite, name: str, flags: list[str], remedy: str) -> None:
    """The message says what to install."""
    if name == "psycopg":
        site.environment["DATABASE_URL"] = "postgresql://user@127.0.0.1:9/name"
    said = sentence(without(site, (name,), *flags), 2)
    assert name in said
    assert remedy in said


@pytest.mark.parametrize(
    ("changes", "flags", "code", "parts"),
    [
        ({"DATABASE_URL": ""}, ["--batch"], 2, ["DATABASE_URL is not set", "--sample"]),
        ({"DATABASE_URL": "sqlite:///nowhere.db"}, ["--batch"], 3, ["there is no SQLite file", "DATABASE_URL"]),
        ({"DATABASE_URL": "no address"}, ["--batch"], 2, ["cannot be read as an address"]),
        ({"OPENAI_API_KEY": ""}, ["--batch"], 2, ["OPENAI_API_KEY is not set"]),
        ({"EMBEDDING_BATCH_SIZE": "0"}, ["--batch"], 2, ["EMBEDDING_BATCH_SIZE"]),
        ({"EMBEDDING_MODEL": "x", "EMBEDDING_PROVIDER": "local"}, ["--batch"], 2, ["all-MiniLM-L6-v2"]),
        (
            {"EMBEDDING_PROVIDER": "ollama", "OLLAMA_ENDPOINT": "http://127.0.0.1:9"},
            ["--batch"],
            3,
            ["127.0.0.1:9"],
        ),
        ({"INDEX_DIR": "/proc/none"}, ["--batch"], 2, ["INDEX_DIR"]),
        ({}, ["--batch", "--output", "nowhere/out.json"], 2, ["nowhere/out.json"]),
    ],
)
def test_configuration_error_is_one_sentence(
    site: IndexSite, changes: dict[str, str], flags: list[str], code: int, parts: list[str]
) -> None:
    """No call is made."""
    said = sentence(site.run(*flags, **changes), code)
    for part in parts:
        assert part in said
    assert site.calls == 0


def test_the_key_is_refused(site: IndexSite) -> None:
    """The run ends after one call with exit code 2 and does not show the key."""
    site.fake.configure(faults=[{"kind": "unauthorized_401"}])
    ended = site.run("--batch")
    said = sentence(ended, 2)
    assert "OPENAI_API_KEY" in said
    assert KEY not in ended.said
    assert site.calls == 1


def test_a_rate_limit_is_waited_for_and_shown(site: IndexSite) -> None:
    """A wait uses up no attempt."""
    site.fake.configure(faults=[{"kind": "rate_limit_429", "retry_after_ms": 300, "times": 5}])
    ended = site.run("--batch", EMBEDDING_MAX_RETRIES="0")
    assert ended.code == 0, ended.err
    assert "is busy" in ended.err
    assert "next call in 0.3 s" in ended.err
    assert site.calls == 7


def test_a_provider_that_goes_away(site: IndexSite) -> None:
    """Answers are kept and reported; the exit code is 3; the same command resumes and pays only for the rest."""
    faults = [{"kind": "rate_limit_429", "retry_after": 1000, "when": {"from": 2}}]
    site.fake.configure(faults=faults)
    output = site.folder / "out.json"
    environment = {"EMBEDDING_BATCH_SIZE": "2", "EMBEDDING_CONCURRENCY": "1"}
    ended = site.run("--batch", "--json", "--output", str(output), **environment)
    said = sentence(ended, 3)
    assert "asks to wait 1000 s" in said
    assert "same command" in said
    facts = ended.json
    assert (facts["indexed"], facts["error"]) == (TABLES, said.partition(": ")[2])
    assert facts["tokens"] > 0
    site.fake.configure(faults=[])
    again = site.run("--batch", "--json", **environment)
    assert (again.code, again.json["indexed"], again.json["error"]) == (0, RELATIONSHIPS, None), again.err
    assert max(entry["billed"] for entry in site.fake.embedded().values()) == 1


def test_an_item_that_fails_is_named_and_tried_again_next_time(site: IndexSite) -> None:
    """The others are indexed; the exit code is 1."""
    site.fake.configure(faults=[{"kind": "bad_request_400", "when": {"text": "Table customers"}}])
    ended = site.run("--batch")
    assert ended.code == 1, ended.err
    assert "table:customers: the provider refuses it" in ended.out
    assert f"{ITEMS - 1} indexed, 1 failed" in ended.out
    assert site.states() == {"indexed": ITEMS - 1, "failed": 1}
    again = site.run("--batch", "--json")
    assert again.code == 1
    assert list(again.json["problems"]) == ["table:customers"]
    assert again.json["tables"] == {"customers": False}
    assert again.json["success_rate"] == 0
    site.fake.configure(faults=[])
    healed = site.run("--batch", "--json")
    assert (healed.code, healed.json["tables"]) == (0, {"customers": True})
    assert site.states() == {"indexed": ITEMS}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_a_signal_lets_the_calls_in_flight_be_stored(site: IndexSite, number: int) -> None:
    """The exit code is 130; the same command resumes and pays nothing twice."""
    site.fake.configure(faults=[{"kind": "delay", "delay_s": 2, "when": {"from": 1}}])
    environment = {"EMBEDDING_BATCH_SIZE": "1", "EMBEDDING_CONCURRENCY": "2"}
    with site.started("--batch", "--json", **environment) as process:
        site.fake.wait_for("in_flight", at_least=2)
        ended = process.stop(number)
    assert ended.code == 130, ended.err
    assert "the same command resumes where this one stopped" in ended.err
    assert ended.json["interrupted"]
    billed = {key for key, entry in site.fake.embedded().items() if entry["billed"]}
    assert 0 < len(billed) < ITEMS
    with contextlib.closing(sqlite3.connect(site.index / "vectors.sqlite3")) as ledger:
        assert {row[0].hex() for row in ledger.execute("SELECT hash FROM vectors")} == billed, ended.said
    site.fake.configure(faults=[])
    assert site.run("--batch").code == 0
    assert site.states() == {"indexed": ITEMS}
    assert max(entry["billed"] for entry in site.fake.embedded().values()) == 1


def test_a_second_signal_ends_it_at_once(site: IndexSite) -> None:
    """It ends even if a call hangs; stored vectors stay, and the next run resumes."""
    site.fake.configure(faults=[{"kind": "hang"}])
    with site.started("--batch") as process:
        site.fake.wait_for(CALLS, at_least=1)
        process.send_signal(signal.SIGINT)
        until(lambda: "finishing the calls in flight" in said_by(process), "the first signal was not seen")
        ended = process.stop(signal.SIGINT)
    assert ended.code == 130, ended.err
    site.fake.configure(faults=[])
    assert site.run("--batch").code == 0
    assert site.states() == {"indexed": ITEMS}


def test_a_signal_ends_a_search(site: IndexSite) -> None:
    """The first signal ends it, because nothing has to be finished."""
    assert site.run("--batch").code == 0
    site.fake.configure(faults=[{"kind": "hang"}])
    calls = site.calls
    with site.started("--search", "refunds") as process:
        site.fake.wait_for(CALLS, at_least=calls + 1)
        assert process.stop(signal.SIGTERM).code == 130


@pytest.mark.thorough
def test_a_signal_ends_an_opening(site: IndexSite) -> None:
    """The first signal ends it, because nothing has to be finished."""
    with FakeOllama() as ollama:
        ollama.pause()
        endpoint = f"http://127.0.0.1:{ollama.port}"
        place = {"EMBEDDING_PROVIDER": "ollama", "OLLAMA_ENDPOINT": endpoint, "INDEX_DIR": "other"}
        with site.started("--batch", **place) as process:
            until((site.folder / "other/.lock").exists, "it never took its folder")
            assert process.stop(signal.SIGTERM).code == 130


def test_ollama(site: IndexSite) -> None:
    """Ollama costs nothing, and reports its own token counts."""
    with FakeOllama() as ollama:
        variables = {"EMBEDDING_PROVIDER": "ollama", "OLLAMA_ENDPOINT": f"http://127.0.0.1:{ollama.port}"}
        ended = site.run("--batch", "--json", "--max-cost", "0", **variables)
        assert ended.code == 0, ended.err
        assert (ended.json["indexed"], ended.json["cost_usd"], ended.json["calls"]) == (ITEMS, 0.0, 2)
        assert ended.json["tokens"] > 0
        assert site.run("--search", "refunds", **variables).code == 0
    assert site.calls == 0
    away = site.run("--search", "refunds", **variables)
    assert "Ollama" in sentence(away, 3)


def test_the_vector_of_a_dropped_table_stays(site: IndexSite) -> None:
    """The vector stays: it costs nothing when the table comes back."""
    assert site.run("--batch").code == 0
    before = site.vectors()
    site.change("DROP TABLE shipments")
    assert site.run("--batch").code == 0
    assert site.vectors() == before + 1, "of orders the text has changed"
