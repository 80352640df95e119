"""``cli.py doctor`` as a process: every area in one report, whatever fails in it."""

from __future__ import annotations

import json
import os
import pty
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from commands.diagnosis.findings import Finding
from commands.diagnosis.mongo import MAX_CLOCK_DIFFERENCE_S, clock_check, diagnose
from config import load_settings
from config.settings import Settings
from tests.forked_process import ForkedProcess
from tests.replica_set import ReplicaSetMongod
from tests.worker.site import ROOT, Site, conversation
from tests.worker.test_long_conversations import long_conversation

AREAS = ["mongodb", "model", "disk", "labels", "settings"]


def report(site: Site, *flags: str, code: int = 0, **settings: str) -> list[dict[str, Any]]:
    """Return the findings of ``cli.py doctor --json``; fails where it ends with another exit code than *code*."""
    ended = site.run("doctor", "--json", *flags, **settings)
    assert ended.code == code, ended.said
    assert ended.err == "" or "--verbose" in flags
    told = json.loads(ended.out)
    assert set(told) == {"errors", "warnings", "findings"}
    for level in ("error", "warning"):
        assert told[f"{level}s"] == sum(finding["level"] == level for finding in told["findings"])
    for finding in told["findings"]:
        assert set(finding) == {"level", "sentence", "remedy", "numbers", "area"}
        assert finding["remedy"] or finding["level"] == "ok", finding
    return list(told["findings"])


def of_level(found: list[dict[str, Any]], level: str) -> dict[str, str]:
    """Return sentences by area; the last of an area wins."""
    return {finding["area"]: finding["sentence"] for finding in found if finding["level"] == level}


def test_a_site_that_is_ready_has_no_errors(site: Site) -> None:
    assert site.model is not None
    site.source.insert_many([conversation(number, "secret words") for number in range(3)])
    found = report(site, "--max-probe", "4")
    assert list(dict.fromkeys(finding["area"] for finding in found)) == AREAS
    assert of_level(found, "error") == {}
    by_sentence = {finding["sentence"]: finding for finding in found}
    counted = by_sentence[f"{site.database.name}.conversation_set, shape messages: 3 pending."]
    assert counted["numbers"] == {"pending": 3}
    assert "secret words" not in str(found)
    assert sum(finding["area"] == "settings" for finding in found) == len(Settings.model_fields)


def test_the_report_for_people_has_a_heading_for_each_area_and_a_remedy_below(site: Site) -> None:
    ended = site.run("doctor", "--no-probe")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    headings = [line for line in lines if not line.startswith(("ok ", "warning ", "error ", " ", "Errors:"))]
    assert headings == ["MongoDB", "Model server", "Disk and process", "Labels", "Settings"]
    place = lines.index(f"warning  {site.database.name}.conversation_set is empty.")
    assert lines[place + 1].startswith("         -> python utils/mongodb_import.py")
    assert lines[-1] == "Errors: 0, warnings: 2."


def test_nothing_is_changed(site: Site) -> None:
    site.source.insert_one(conversation(1))
    before = site.source.find_one()
    report(site)
    assert site.source.find_one() == before
    assert site.database.list_collection_names() == ["conversation_set"]
    assert not site.directory.exists()


def test_looking_does_not_stop_a_worker_that_runs(site: Site) -> None:
    """It sees the lock, and the worker goes on to its end."""
    assert site.model is not None
    site.source.insert_many([conversation(number) for number in range(20)])
    site.model.configure(latency_s=0.5, slots=2)
    with site.start() as worker:
        site.model.wait_for("chat_requests", 2, timeout_s=30)
        found = report(site, "--no-probe")
        assert any(finding["sentence"].startswith("A worker is using") for finding in found)
        assert worker.ended().code == 0
    assert site.results.count_documents({}) == 20


def test_each_area_is_there_whatever_fails_in_the_others(site: Site) -> None:
    """MongoDB away, model server away, directory a file, labels unreadable: four errors, and the settings."""
    site.folder.joinpath("file").write_text("")
    uri = "mongodb://user:p%40ssword@127.0.0.1:1/?authSource=admin"
    broken = {"OLLAMA_ENDPOINT": "http://127.0.0.1:1", "TAXONOMY_FILE": "missing.yaml", "MONGODB_TIMEOUT_MS": "300"}
    found = report(site, "--batch-files-dir", str(site.folder / "file"), code=3, MONGODB_URI=uri, **broken)
    assert set(of_level(found, "error")) == {"mongodb", "model", "disk", "labels"}
    assert sum(finding["area"] == "settings" for finding in found) == len(Settings.model_fields)
    assert "p%40ssword" not in str(found)


def test_an_address_of_mongodb_that_is_none_does_not_hide_the_rest(site: Site) -> None:
    found = report(site, "--no-probe", code=3, MONGODB_URI="mongodb://u:p@ss/w0rd@h/?x=y")
    assert "MONGODB_URI is not a usable address" in of_level(found, "error")["mongodb"]
    assert "w0rd" not in str(found)
    assert {finding["area"] for finding in found} == set(AREAS)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mongodb-uri", "localhost"], "MONGODB_URI"),
        (["--max-probe", "0"], "--max-probe"),
        (["--ollama-endpoint", "nonsense"], "OLLAMA_ENDPOINT"),
    ],
)
def test_wrong_usage_is_exit_code_2(site: Site, flags: list[str], named: str) -> None:
    ended = site.run("doctor", *flags)
    assert (ended.code, ended.out) == (2, "")
    assert named in ended.err


def test_flags_reach_the_server_and_are_named_as_origins(site: Site) -> None:
    assert site.model is not None
    settings = {"OLLAMA_ENDPOINT": "http://127.0.0.1:1", "OLLAMA_MODEL": "missing"}
    found = report(
        site, "--no-probe", "--verbose", "--ollama-endpoint", site.model.url, "--model", "qwen3:8b", **settings
    )
    numbers = {finding["numbers"]["setting"]: finding["numbers"] for finding in found if finding["area"] == "settings"}
    origins = {field: (told["origin"], told["origin_name"]) for field, told in numbers.items()}
    assert origins["ollama_endpoint"] == ("argument", "--ollama-endpoint")
    assert origins["ollama_model"] == ("argument", "--model")
    assert origins["log_level"] == ("argument", "--verbose")
    assert origins["mongodb_uri"] == ("environment", "MONGODB_URI")
    assert origins["lease_s"] == ("default", None)


def test_without_a_probe_the_model_is_not_asked(site: Site) -> None:
    assert site.model is not None
    report(site, "--no-probe")
    assert site.model.stats()["chat_requests"] == 0


def test_the_probe_asks_no_more_at_once_than_it_may(site: Site) -> None:
    assert site.model is not None
    report(site, "--max-probe", "3")
    assert site.model.stats()["max_in_flight"] == 3


def test_a_replica_set_is_told_from_a_standalone_server(site: Site, tmp_path: Path) -> None:
    with ReplicaSetMongod(tmp_path / "db") as server:
        found = report(site, "--no-probe", MONGODB_URI=server.uri)
        server.kill()
    assert any("It is a replica set (rs0, 1 members)" in finding["sentence"] for finding in found)
    assert any("standalone" in finding["sentence"] for finding in report(site, "--no-probe"))


def test_progress_is_shown_on_a_terminal_only(site: Site) -> None:
    """Stderr is a terminal here, stdout is not: one JSON object, and a spinner that says what is looked at."""
    assert site.model is not None
    site.model.configure(latency_s=0.5)
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as terminal:
        out, command = site.folder / "out", [str(ROOT / "cli.py"), "doctor", "--json", "--max-probe", "2"]
        with out.open("wb") as file, open(os.devnull, "rb") as nothing:
            streams = [nothing.fileno(), file.fileno(), follower]
            with ForkedProcess(command, site.environment(TERM="xterm"), site.folder, None, streams=streams) as process:
                os.close(follower)
                assert process.wait(60) == 0
        shown = b""
        try:
            while piece := terminal.read(65_536):
                shown += piece
        except OSError:  # Linux says so where the other end is closed
            pass
    assert json.loads(out.read_text())["errors"] == 0
    for words in ("2 at once, 2 rounds", "Looking at Settings"):
        assert words in shown.decode()


# The clock


@pytest.mark.parametrize(
    ("shift_s", "level", "words"), [(0, "ok", "differ by"), (3600, "warning", "ahead of"), (-60, "warning", "behind")]
)
async def test_clocks_that_differ_are_a_warning(mongodb_uri: str, shift_s: int, level: str, words: str) -> None:
    """The server is real; the clock here is shifted."""
    check = clock_check(lambda: datetime.now(UTC) + timedelta(seconds=shift_s))
    settings = load_settings(None, mongodb_uri=mongodb_uri)
    found: list[Finding] = [finding async for finding in diagnose(settings, check)]
    assert found[-1].level == level
    assert words in found[-1].sentence
    assert abs(found[-1].numbers["ahead_s"] - shift_s) < MAX_CLOCK_DIFFERENCE_S


def test_the_doctor_looks_at_the_clock(site: Site) -> None:
    assert any(
        finding["sentence"].startswith("The clocks here and of MongoDB") for finding in report(site, "--no-probe")
    )


def test_files_it_looks_at_keep_their_modes(site: Site) -> None:
    site.source.insert_one(conversation(1))
    assert site.run().code == 0
    before = {path: stat.S_IMODE(path.stat().st_mode) for path in site.directory.rglob("*")}
    report(site, "--no-probe")
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in site.directory.rglob("*")} == before


@pytest.mark.parametrize(("turns", "window"), [(1, 4096), (200, 16_384)])
def test_it_loads_the_window_that_the_next_run_takes(site: Site, turns: int, window: int) -> None:
    """Chosen by the same sample; the run finds the model loaded as it needs it."""
    assert site.model is not None
    site.source.insert_many([long_conversation(number, turns) for number in range(12)])
    found = report(site, "--max-probe", "2")
    chosen = next(finding for finding in found if finding["sentence"].startswith("A run uses a window of"))
    assert chosen["numbers"] == {"num_ctx": window, "asked": None, "sample": 12, "held": 1.0}
    assert {record["options"]["num_ctx"] for record in site.model.requests()} == {window}
    assert site.run().code == 0
    assert {record["options"]["num_ctx"] for record in site.model.requests()} == {window}
    stats = site.model.stats()
    assert (stats["loads"], stats["reloads"]) == (1, 0)


def test_without_mongodb_the_model_is_looked_at_all_the_same(site: Site) -> None:
    """In the window of one who knows no documents, and it says why."""
    found = report(site, code=3, MONGODB_URI="mongodb://127.0.0.1:1", MONGODB_TIMEOUT_MS="300")
    assert set(of_level(found, "error")) == {"mongodb"}
    asked = next(finding for finding in found if "Could not measure the documents" in finding["sentence"])
    assert (asked["level"], asked["area"]) == ("warning", "model")
    assert any("gives the whole window of 8192" in finding["sentence"] for finding in found)
