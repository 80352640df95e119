"""``cli.py doctor`` as a process: one report of all areas, whatever fails."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from commands.diagnosis.findings import Finding
from commands.diagnosis.mongo import MAX_CLOCK_DIFFERENCE_S, diagnose
from config import load_settings
from config.settings import Settings
from embedded.replica_set import ReplicaSetMongod
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.forked_process import ForkedProcess
from tests.terminal import Terminal
from tests.worker.long_conversations import long_conversation
from tests.worker.site import ROOT, Site, conversation

AREAS = ["mongodb", "model", "disk", "labels", "settings"]


def report(site: Site, *flags: str, code: int = 0, **settings: str) -> list[dict[str, Any]]:
    """Return the findings of ``cli.py doctor --json``; fail unless it exits with *code*."""
    ended = site.run("doctor", "--json", *flags, **settings)
    assert ended.code == code, ended.said
    assert ended.err == "" or "--verbose" in flags
    answer = json.loads(ended.out)
    assert set(answer) == {"errors", "warnings", "findings"}
    for level in ("error", "warning"):
        assert answer[f"{level}s"] == sum(finding["level"] == level for finding in answer["findings"])
    for finding in answer["findings"]:
        assert set(finding) == {"level", "sentence", "remedy", "numbers", "area"}
        assert finding["remedy"] or finding["level"] == "ok", finding
    return list(answer["findings"])


def of_level(found: list[dict[str, Any]], level: str) -> dict[str, str]:
    """Return the last sentence of each area."""
    return {finding["area"]: finding["sentence"] for finding in found if finding["level"] == level}


def test_ready_site_has_no_errors(site: Site) -> None:
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


def test_text_report_has_headings_and_remedies(site: Site) -> None:
    ended = site.run("doctor", "--no-probe")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    headings = [line for line in lines if not line.startswith(("ok ", "warning ", "error ", " ", "Errors:"))]
    assert headings == ["MongoDB", "Model server", "Disk and process", "Labels", "Settings"]
    place = lines.index(f"warning  {site.database.name}.conversation_set is empty.")
    assert lines[place + 1].startswith("         -> Import documents with python -m utils.mongodb_import")
    assert lines[-1] == "Errors: 0, warnings: 2."


def test_doctor_changes_nothing(site: Site) -> None:
    site.source.insert_one(conversation(1))
    before = site.source.find_one()
    report(site)
    assert site.source.find_one() == before
    assert site.database.list_collection_names() == ["conversation_set"]
    assert not site.directory.exists()


@pytest.mark.thorough
def test_doctor_does_not_disturb_a_running_worker(site: Site) -> None:
    """It reports the lock, and the worker finishes."""
    assert site.model is not None
    site.source.insert_many([conversation(number) for number in range(20)])
    site.model.configure(latency_s=0.5, slots=2)
    with site.start() as worker:
        site.model.wait_for("chat_requests", 2, timeout_s=30)
        found = report(site, "--no-probe")
        assert any(finding["sentence"].startswith("A worker is using") for finding in found)
        assert worker.ended().code == 0
    assert site.results.count_documents({}) == 20


def test_failing_areas_do_not_hide_each_other(site: Site) -> None:
    """MongoDB away, model server away, directory a file, labels unreadable: four errors, and the settings."""
    site.folder.joinpath("file").write_text("")
    uri = "mongodb://user:p%40ssword@127.0.0.1:1/?authSource=admin"
    broken = {"OLLAMA_ENDPOINT": "http://127.0.0.1:1", "TAXONOMY_FILE": "missing.yaml", "MONGODB_TIMEOUT_MS": "300"}
    found = report(site, "--batch-files-dir", str(site.folder / "file"), code=3, MONGODB_URI=uri, **broken)
    assert set(of_level(found, "error")) == {"mongodb", "model", "disk", "labels"}
    assert sum(finding["area"] == "settings" for finding in found) == len(Settings.model_fields)
    assert "p%40ssword" not in str(found)


def test_invalid_mongodb_uri_does_not_hide_other_areas(site: Site) -> None:
    found = report(site, "--no-probe", code=3, MONGODB_URI="mongodb://u:p@ss/w0rd@h/?x=y")
    assert "percent-encode" in of_level(found, "error")["mongodb"]
    assert "w0rd" not in str(found)
    assert {finding["area"] for finding in found} == set(AREAS)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mongodb-uri", "localhost"], "MONGODB_URI"),
        (["--max-probe", "0"], "--max-probe"),
        (["--ollama-endpoint", "ftp://nonsense"], "OLLAMA_ENDPOINT"),
    ],
)
def test_invalid_flags_exit_with_2(site: Site, flags: list[str], named: str) -> None:
    ended = site.run("doctor", *flags)
    assert (ended.code, ended.out) == (2, "")
    assert named in ended.err


def test_flags_take_effect_and_are_reported_as_origins(site: Site) -> None:
    assert site.model is not None
    settings = {"OLLAMA_ENDPOINT": "http://127.0.0.1:1", "OLLAMA_MODEL": "missing"}
    found = report(
        site, "--no-probe", "--verbose", "--ollama-endpoint", site.model.url, "--model", "qwen3:8b", **settings
    )
    numbers = {finding["numbers"]["setting"]: finding["numbers"] for finding in found if finding["area"] == "settings"}
    origins = {field: (each["origin"], each["origin_name"]) for field, each in numbers.items()}
    assert origins["ollama_endpoint"] == ("argument", "--ollama-endpoint")
    assert origins["ollama_model"] == ("argument", "--model")
    assert origins["log_level"] == ("argument", "--verbose")
    assert origins["mongodb_uri"] == ("environment", "MONGODB_URI")
    assert origins["lease_s"] == ("default", None)


def test_no_probe_sends_no_chat_requests(site: Site) -> None:
    assert site.model is not None
    report(site, "--no-probe")
    assert site.model.stats()["chat_requests"] == 0


def test_max_probe_limits_concurrent_requests(site: Site) -> None:
    assert site.model is not None
    report(site, "--max-probe", "3")
    assert site.model.stats()["max_in_flight"] == 3


@pytest.mark.thorough
def test_replica_set_and_standalone_server_are_distinguished(site: Site, tmp_path: Path) -> None:
    with ReplicaSetMongod(tmp_path / "db") as server:
        found = report(site, "--no-probe", MONGODB_URI=server.uri)
        server.kill()
    assert any("It is a replica set (rs0, 1 member)" in finding["sentence"] for finding in found)
    assert any("standalone" in finding["sentence"] for finding in report(site, "--no-probe"))


@pytest.mark.thorough
def test_progress_is_shown_only_on_a_terminal(site: Site) -> None:
    """Stderr is a terminal, stdout a file: one JSON object, and a spinner that names the current check."""
    assert site.model is not None
    site.model.configure(latency_s=0.5)
    out, command = site.folder / "out", [str(ROOT / "cli.py"), "doctor", "--json", "--max-probe", "2"]
    with Terminal() as terminal, out.open("wb") as file, open(os.devnull, "rb") as nothing:
        streams = [nothing.fileno(), file.fileno(), terminal.inner]
        with ForkedProcess(command, site.environment(TERM="xterm"), site.folder, None, streams=streams) as process:
            shown = terminal.shown_until_end_of(process)
            assert process.wait(60) == 0
    assert json.loads(out.read_text())["errors"] == 0
    for words in ("2 at once, round 2 of 2", "Checking Settings"):
        assert words in shown


# The clock


@pytest.mark.parametrize(
    ("shift_s", "level", "words"), [(0, "ok", "differ by"), (3600, "warning", "ahead of"), (-60, "warning", "behind")]
)
async def test_clock_difference_is_a_warning(mongodb_uri: str, shift_s: int, level: str, words: str) -> None:
    """The server is real; the local clock is shifted."""
    settings = load_settings(None, mongodb_uri=mongodb_uri)
    checks = diagnose(settings, lambda: datetime.now(UTC) + timedelta(seconds=shift_s))
    found: list[Finding] = [finding async for finding in checks]
    assert found[-1].level == level
    assert words in found[-1].sentence
    assert abs(found[-1].numbers["ahead_s"] - shift_s) < MAX_CLOCK_DIFFERENCE_S


def test_doctor_checks_the_clock(site: Site) -> None:
    assert any(
        finding["sentence"].startswith("The local clock and MongoDB's clock") for finding in report(site, "--no-probe")
    )


def test_doctor_keeps_file_modes(site: Site) -> None:
    site.source.insert_one(conversation(1))
    assert site.run().code == 0
    before = {path: stat.S_IMODE(path.stat().st_mode) for path in site.directory.rglob("*")}
    report(site, "--no-probe")
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in site.directory.rglob("*")} == before


@pytest.mark.parametrize(("turns", "window"), mostly_thorough([(1, 4096), (200, 16_384)], 2, first=1))
def test_doctor_loads_the_window_of_the_next_run(site: Site, turns: int, window: int) -> None:
    """Both choose it from the same sample, so the run does not reload the model."""
    assert site.model is not None
    site.source.insert_many([long_conversation(number, turns) for number in range(12)])
    found = report(site, "--max-probe", "2")
    chosen = next(finding for finding in found if finding["sentence"].startswith("A run's context window: "))
    assert chosen["numbers"] == {"num_ctx": window, "asked": None, "sample": 12, "held": 1.0}
    assert {record["options"]["num_ctx"] for record in site.model.requests()} == {window}
    assert site.run().code == 0
    assert {record["options"]["num_ctx"] for record in site.model.requests()} == {window}
    stats = site.model.stats()
    assert (stats["loads"], stats["reloads"]) == (1, 0)


def test_model_is_checked_without_mongodb(site: Site) -> None:
    """With the default window, and a warning that says why."""
    found = report(site, code=3, MONGODB_URI="mongodb://127.0.0.1:1", MONGODB_TIMEOUT_MS="300")
    assert set(of_level(found, "error")) == {"mongodb"}
    asked = next(finding for finding in found if "Could not measure the documents" in finding["sentence"])
    assert (asked["level"], asked["area"]) == ("warning", "model")
    assert any("gives the whole window of 8192" in finding["sentence"] for finding in found)


def test_several_model_servers_are_checked_one_by_one_and_compared(site: Site) -> None:
    """One that differs would be left out."""
    assert site.model is not None
    with (
        FakeOllama() as second,
        FakeOllama(models=[{"name": "llama3.2:latest", "copy_of": "another"}]) as third,
    ):
        address = ",".join(one.url for one in (site.model, second, third))
        found = report(site, "--no-probe", OLLAMA_ENDPOINT=address)
        names = [one.url.removeprefix("http://") for one in (site.model, second, third)]
        levels = {
            finding["sentence"][: len(names[0])]: finding["level"] for finding in found if finding["area"] == "servers"
        }
        assert levels == dict(zip(names, ("ok", "ok", "warning"), strict=True))
        assert sum("answers at http" in finding["sentence"] for finding in found) == 3
        found = report(site, "--no-probe", OLLAMA_ENDPOINT=f"{second.url},{third.url}", code=3)
        assert "No two servers are alike" in of_level(found, "error")["servers"]
