"""The import script as people start it, against a real MongoDB."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo.collection import Collection
from pymongo.database import Database

from tests.environment import clean_environment
from tests.forked_process import run_forked
from tests.in_process import run_script
from utils import mongodb_import

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "utils" / "mongodb_import.py"
COLLECTION = "conversation_set"
EXPORTS = ROOT / "tests" / "help_desks" / "exports"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def source(database: Database[dict[str, Any]]) -> Collection[dict[str, Any]]:
    return database[COLLECTION]


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Run:
    """Run the script in a folder without .env; with *streams*, in a separate process with these descriptors."""

    def start(
        *arguments: str | Path, env: dict[str, str] | None = None, streams: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = ["--mongodb-uri", mongodb_uri, "--db-name", db_name, *arguments]
        environment = env or clean_environment()
        if streams:
            return run_forked([SCRIPT, *command], environment, tmp_path, streams=streams)
        return run_script(mongodb_import.main, SCRIPT, command, environment, tmp_path)

    return start


def lines_of(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


# Starting it


@pytest.mark.parametrize(
    "command",
    [pytest.param(["utils/mongodb_import.py"], marks=pytest.mark.thorough), ["-m", "utils.mongodb_import"]],
    ids=["as a file", "as a module"],
)
def test_it_starts_from_the_repository(
    command: list[str], mongodb_uri: str, db_name: str, source: Collection[dict[str, Any]]
) -> None:
    environment = clean_environment() | {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name}
    done = run_forked([*command, "--count", "5"], environment, ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Read 5 documents: 5 new, 0 already there, in {db_name}.{COLLECTION}.\n"
    assert source.count_documents({}) == 5


@pytest.mark.parametrize(
    "name",
    [
        "mongodb_import",
        pytest.param("concurrency_check", marks=pytest.mark.thorough),
        pytest.param("demo_batch_processor", marks=pytest.mark.thorough),
    ],
)
def test_modules_beside_a_script_hide_no_package(name: str) -> None:
    """Started as a file, the script's own folder does not stay on sys.path."""
    script = ROOT / "utils" / f"{name}.py"
    probe = (
        "import runpy, sys\n"
        f"sys.path[0], sys.argv = {str(script.parent)!r}, ['x', '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit: print('PATH', *sys.path, sep='\\n')\n"
    )
    done = run_forked(["-c", probe], clean_environment(), ROOT / "tests")
    path = done.stdout.partition("PATH\n")[2].splitlines()
    assert path[0] == str(ROOT)
    assert str(script.parent) not in path


# Samples


def test_samples_go_in_once(run: Run, source: Collection[dict[str, Any]]) -> None:
    assert "Read 96 documents: 96 new, 0 already there" in run().stdout
    source.update_many({}, {"$set": {"status": "processed"}})
    assert "Read 96 documents: 0 new, 96 already there" in run().stdout
    assert source.count_documents({"status": "processed"}) == 96


def test_more_samples_than_there_are_repeat_under_new_ids_and_numbers(
    run: Run, source: Collection[dict[str, Any]]
) -> None:
    done = run("--count", "200")
    assert "Read 200 documents: 200 new" in done.stdout
    assert "96 samples are shipped: 104 of the 200" in done.stderr
    numbers = [document["conversation_number"] for document in source.find({"conversation_number": {"$exists": True}})]
    assert len(numbers) == len(set(numbers))
    assert "Read 200 documents: 0 new, 200 already there" in run("--count", "200").stdout


# Files


def test_statuses_that_no_run_selects_are_named(run: Run, tmp_path: Path) -> None:
    """Those of documents that are done."""
    statuses = ["processed", "skipped", "processed", "pending", None]
    documents = [{"_id": number, "text": "hi", "status": status} for number, status in enumerate(statuses)]
    done = run("--file", lines_of(tmp_path / "a.jsonl", [*documents, {"_id": 9, "text": "hi", "processed": True}]))
    assert done.returncode == 0
    assert "4 documents have a status that a run does not select: processed (3), skipped (1)." in done.stderr


def test_status_of_another_program_hides_no_document(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    statuses = [*["closed"] * 3, "", "pending"]
    documents: list[dict[str, Any]] = [
        {
            "_id": number,
            "messages": [{"sender": "customer", "text": "hi"}],
            "status": status,
            "metadata": {"region": "EU"},
        }
        for number, status in enumerate(statuses)
    ]
    documents.append({"_id": 9, "text": "hi", "status": "solved"})
    done = run("--file", lines_of(tmp_path / "a.jsonl", documents))
    assert "5 documents had a status of another program: closed (3), '' (1), solved (1)." in done.stderr
    assert source.count_documents({"status": "pending"}) == 5
    assert source.find_one({"_id": 0})["metadata"] == {"region": "EU", "status": "closed"}  # type: ignore[index]
    assert source.find_one({"_id": 9}) == {"_id": 9, "text": "hi", "metadata": {"status": "solved"}}


def test_status_stays_where_the_state_has_a_field_of_its_own(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    said = [{"sender": "customer", "text": "hi"}]
    documents = [{"_id": 1, "text": "hi", "status": "closed"}, {"_id": 2, "messages": said, "status": "pending"}]
    path = lines_of(tmp_path / "a.jsonl", documents)
    own = clean_environment() | {"STATUS_FIELD": "triad"}
    assert run("--file", path, env=own).stderr == ""
    assert run("--file", EXPORTS / "freshdesk.json", env=own).returncode == 0
    assert [document.get("status") for document in source.find(sort=[("_id", 1)])] == ["closed", "pending", None, None]
    assert source.count_documents({"triad": {"$exists": True}}) == 0
    path = lines_of(tmp_path / "a.jsonl", [{"_id": 3, "messages": said, "triad": "open"}])
    assert "1 document had a status of another program: open (1)." in run("--file", path, env=own).stderr
    expected = {"_id": 3, "messages": said, "triad": "pending", "metadata": {"status": "open"}}
    assert source.find_one({"_id": 3}) == expected


def test_documents_without_id_are_recognised_by_their_content(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    conversation = {"conversation_number": "7", "messages": [{"sender": "customer", "text": "hi"}]}
    same_again = [conversation, conversation | {"status": "processed"}]
    queries = [{"text": "thanks"}, {"text": "thanks"}]  # two people said so
    path = lines_of(tmp_path / "a.jsonl", [*same_again, *queries])
    assert "Read 4 documents: 3 new, 1 already there" in run("--file", path).stdout
    assert source.count_documents({"text": "thanks"}) == 2
    assert "Read 4 documents: 0 new, 4 already there" in run("--file", path).stdout
    assert all(str(document["_id"]).startswith("sha256-") for document in source.find())


def test_count_takes_the_first_of_a_file_and_collection_has_two_names(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "q.csv"
    path.write_text("id,text\n" + "".join(f"doc{number},hello\n" for number in range(1200)))
    assert "Read 1,100 documents: 1100 new" in run("--file", path, "--count", "1100", "--collection", "queries").stdout
    assert "Read 1,200 documents: 100 new" in run("--file", path, "--source-collection", "queries").stdout
    assert source.database["queries"].find_one({"_id": "doc7"}) == {
        "_id": "doc7",
        "text": "hello",
        "metadata": {},
        "processed": False,
        "processing_attempts": 0,
    }


def test_what_a_run_would_skip_or_could_not_order_is_named(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "hi", "created_at": 1714550000}, {"role": "assistant", "content": "ho"}]
    documents: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": [{"sender": "Ann Example", "text": "hi"}]},
        {"messages": [{"sender": "customer", "words": "hi"}]},
        {"messages": chat},
        {"messages": [], "text": "hi"},
        {"messages": [{"sender": "Bob Example", "text": "hi"}]},
    ]
    done = run("--file", lines_of(tmp_path / "chats.jsonl", documents))
    assert (done.returncode, "Read 6 documents: 6 new" in done.stdout) == (0, True)
    skipped, without_text, unordered = done.stderr.splitlines()
    assert skipped.startswith(
        "2 documents without a turn of the customer, which a run skips; expected in sender, role,"
    )
    assert skipped.endswith("end-user or requester (first: document 2).")
    assert without_text.startswith("1 document without a text, which a run skips; a text is expected in text, content,")
    assert unordered.startswith("1 document with times that cannot be read, so the turns keep the listed order;")
    assert unordered.endswith("(first: document 4).")
    assert "Example" not in done.stderr


def test_stored_document_with_another_text_is_named(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    path = lines_of(tmp_path / "q.jsonl", [{"_id": 1, "text": "a"}, {"_id": 1, "text": "b"}, {"_id": 2, "text": "c"}])
    expected = "1 document with the _id of a stored document that has another text; not imported (first: document 2)."
    done = run("--file", path)
    assert "Read 3 documents: 2 new, 1 already there" in done.stdout
    assert done.stderr.splitlines() == [expected]
    source.update_many({}, {"$set": {"processed": True, "status_reason": None}})
    assert run("--file", path).stderr.splitlines() == [expected]
    assert [document["text"] for document in source.find(sort=[("_id", 1)])] == ["a", "c"]


# Exports of help desks


def test_dry_run_needs_no_server_and_shows_mapping_and_two_conversations(run: Run) -> None:
    done = run(
        "--mongodb-uri", "mongodb://127.0.0.1:1", "--file", EXPORTS / "zendesk_tickets.csv", "--dry-run", "--drop"
    )
    assert (done.returncode, done.stderr) == (0, "1 conversation without a text; the subject is the text (line 6).\n")
    lines = done.stdout.splitlines()
    assert lines[0] == "3 records, read as zendesk:"
    assert [line.split() for line in lines[1:4]] == [
        ["column", "field", "empty"],
        ["Description", "messages.text", "1"],
        ["Created", "at", "messages.timestamp,", "created_at", "0"],
    ]
    assert ["Status", "metadata.status", "0"] in [line.split() for line in lines]
    assert "    2026-03-09 11:02  Customer: You charged my card twice, please refund one payment." in lines
    assert "zendesk-1003" not in done.stdout
    assert lines[-1] == "Read 3 documents: nothing is written (--dry-run)."


def test_dry_run_writes_nothing(run: Run, source: Collection[dict[str, Any]]) -> None:
    source.insert_one({"_id": "old"})
    assert run("--file", EXPORTS / "intercom.json", "--dry-run", "--drop", "--yes").returncode == 0
    assert [document["_id"] for document in source.find()] == ["old"]


def test_export_goes_in_once_and_a_ticket_that_has_grown_is_named(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    export = EXPORTS / "zendesk_tickets.csv"
    assert "Read 3 documents: 3 new" in run("--file", export).stdout
    later = tmp_path / "later.csv"
    later.write_text(export.read_text().replace("Open", "Solved").replace("one payment", "both payments"))
    done = run("--file", later)
    assert "Read 3 documents: 0 new, 3 already there" in done.stdout
    assert "1 document with the _id of a stored document that has another text; not imported" in done.stderr
    stored = source.find_one({"_id": "zendesk-1002"})
    assert stored is not None
    assert (stored["status"], stored["metadata"]["status"]) == ("pending", "Open")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_later_export_of_a_table_with_another_status_adds_nothing(run: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for status, expected in (("open", "2 new"), ("closed", "0 new")):
        rows = [["1", "user", "hi", status], ["2", "user", "hi", status], ["1", "agent", "ho", status]]
        header = ["Case number", "Role", "Body", "Status"]
        as_json = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
        path.write_text("\n".join(as_json if name == "a.jsonl" else [",".join(row) for row in [header, *rows]]))
        assert f"Read 2 documents: {expected}" in run("--file", path).stdout


def test_flags_reach_the_reader(run: Run, source: Collection[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("Nr;Wer;Was;Am;E-Mail\n1;Käufer;Größe?;03/04/2026;ann@example.com\n".encode("cp1252"))
    maps = ("--map", "text=was", "--map", "sender=Wer", "--map", "conversation_number=Nr", "--map", "created_at=Am")
    more = ("--customer-role", "käufer", "--dates", "day-first", "--drop-column", "E-Mail", "--encoding", "cp1252")
    done = run("--file", path, *maps, *more)
    assert (done.returncode, done.stderr) == (0, "")
    document = source.find_one()
    assert document is not None
    assert document["messages"] == [
        {"sender": "customer", "timestamp": datetime(2026, 4, 3, tzinfo=UTC), "text": "Größe?"}
    ]
    assert "metadata" not in document


@pytest.mark.parametrize(
    "flag",
    [
        ("--map", "text=a"),
        ("--format", "zendesk"),
        ("--drop-column", "a"),
        ("--encoding", "cp1252"),
        ("--dates", "day-first"),
        ("--private-notes",),
    ],
)
def test_flags_about_a_file_need_one(capsys: pytest.CaptureFixture[str], flag: tuple[str, ...]) -> None:
    assert mongodb_import.main([*flag]) == 2
    assert f"{flag[0]} is about the file to import; add --file FILE." in capsys.readouterr().err


def test_preview_hides_control_characters(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket_id,message,subject,\x1b[31mtag\n1,\x1b[31mred,\x1b[31mred,\x1b]0;title\x07\n")
    assert "\x1b" not in run("--file", path, "--dry-run").stdout


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["big.csv", "big.json", "big.jsonl"])
def test_import_of_60_mb_needs_little_memory(name: str, tmp_path: Path) -> None:
    """Without streaming, the array alone needs several times its size."""
    path = tmp_path / name
    rows = [
        {"ticket_id": n // 4, "body": f"My parcel {n} is late. " + "word " * 600, "at": 1772442845 + n}
        for n in range(20_000)
    ]
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("ticket_id,body,at\n" + "".join(f"{r['ticket_id']},{r['body']},{r['at']}\n" for r in rows))
        elif path.suffix == ".json":
            file.write("[" + ",\n".join(map(json.dumps, rows)) + "]")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    command = f"import sys; sys.argv = ['x', '--file', {str(path)!r}, '--dry-run']\n"
    command += "from utils import mongodb_import\ncode = mongodb_import.main()\n"
    command += "print('PEAK', code, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=110, cwd=ROOT
    )
    code, peak = done.stdout.split("PEAK")[1].split()
    assert "Read 5,000 documents" in done.stdout
    assert (int(code), int(peak) < 120_000) == (0, True), peak


# Emptying first


def test_drop_empties_the_collection_and_nothing_else(run: Run, source: Collection[dict[str, Any]]) -> None:
    source.insert_one({"_id": "old"})
    source.database["other"].insert_one({"_id": "old"})
    assert "2 new" in run("--count", "2", "--drop", "--yes").stdout
    assert source.count_documents({}) == 2
    assert source.database["other"].count_documents({}) == 1


def test_drop_without_a_terminal_needs_yes(run: Run, source: Collection[dict[str, Any]]) -> None:
    source.insert_one({"_id": "old"})
    done = run("--drop")
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    assert source.count_documents({}) == 1


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 2), ("n", 130, 1)])
def test_drop_asks_on_a_terminal(
    run: Run, source: Collection[dict[str, Any]], answer: str, code: int, left: int
) -> None:
    source.insert_one({"_id": "old"})
    person, terminal = pty.openpty()
    try:
        os.write(person, f"{answer}\n".encode())
        done = run("--drop", "--count", "2", streams=[terminal])
    finally:
        os.close(person)
        os.close(terminal)
    assert done.returncode == code
    assert f"Delete the collection {COLLECTION}" in done.stderr
    assert source.count_documents({}) == left


def test_a_wrong_file_is_found_before_anything_is_dropped(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    source.insert_one({"_id": "old"})
    done = run("--drop", "--yes", "--file", lines_of(tmp_path / "a.jsonl", [{"colour": "no shape"}]))
    assert done.returncode == 2
    assert "a.jsonl, line 1: expected an object with tweets" in done.stderr
    assert source.count_documents({}) == 1


# What goes wrong


def test_an_error_in_the_middle_keeps_what_was_read(
    run: Run, source: Collection[dict[str, Any]], tmp_path: Path
) -> None:
    path = lines_of(tmp_path / "a.jsonl", [{"_id": number, "text": "hi"} for number in range(600)])
    with path.open("a") as file:
        file.write("{broken\n")
    done = run("--file", path)
    assert done.returncode == 2
    assert "500 documents were imported before the error" in done.stderr
    assert f"{path}, line 601" in done.stderr
    assert source.count_documents({}) == 500


@pytest.mark.parametrize(
    ("document", "named"),
    [
        pytest.param(
            {"_id": 2, "text": "x" * 17_000_000},
            "document 2 cannot be stored",
            id="larger than 16 MB",
            marks=pytest.mark.thorough,
        ),
        pytest.param({"_id": 2, "text": "a", "n": 2**70}, "document 2 cannot be stored", id="number too large"),
        pytest.param({"_id": {"a": 2**70}, "text": "a"}, "document 2 cannot be stored", id="number in the id"),
        pytest.param({"_id": 2, "text": "\ud83d"}, "document 2 cannot be stored", id="half a character"),
        pytest.param({"text": "\ud83d"}, "Document 2 contains a value", id="half a character, no id"),
    ],
)
def test_a_document_that_mongodb_cannot_hold_is_named(
    run: Run, tmp_path: Path, document: dict[str, Any], named: str
) -> None:
    path = lines_of(tmp_path / "a.jsonl", [{"_id": 1, "text": "ok"}, document, {"_id": 3, "text": "ok"}])
    for flags in ([], ["--dry-run"]):
        done = run("--file", path, *flags)
        assert done.returncode == 2
        assert named in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unreachable_server_is_exit_code_3(run: Run) -> None:
    quick = clean_environment() | {"MONGODB_TIMEOUT_MS": "100", "MONGODB_BACKOFF_S": "0"}
    done = run("--mongodb-uri", "mongodb://user:secret@127.0.0.1:1", env=quick)
    assert done.returncode == 3
    assert "mongodb_import.py: MongoDB does not answer" in done.stderr
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--mongodb-uri", "http://x"], "MONGODB_URI"), (["--file", "/none"], "/none")]
)
def test_usage_errors_are_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert mongodb_import.main(arguments) == 2
    assert named in capsys.readouterr().err
