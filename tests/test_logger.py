"""Log lines have the documented form; secrets, line ends and escape sequences do not get into them."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from logger import KEPT_LOGS, SafeFormatter, configure_logging


@pytest.fixture(autouse=True)
def root() -> Iterator[logging.Logger]:
    """Give the root logger back as it was: pytest listens to it."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    for handler in handlers:
        logger.removeHandler(handler)
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level)


def line_of(message: str, *args: object, secrets: tuple[str, ...] = (), name: str = "batch_processor") -> str:
    record = logging.LogRecord(name, logging.INFO, "x.py", 1, message, args, None)
    return SafeFormatter(secrets).format(record)


def message_of(message: str, *args: object, secrets: tuple[str, ...] = ()) -> str:
    return line_of(message, *args, secrets=secrets).split(" - ", 3)[3]


def test_line_format(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as documented: scripts cut it apart."""
    configure_logging("INFO")
    record = logging.LogRecord("batch_processor", logging.INFO, "x.py", 1, "message", None, None)
    record.created, record.msecs = 1758709800.123, 123.0
    monkeypatch.setattr(logging.Formatter, "converter", time.gmtime)
    logging.getLogger().handle(record)
    assert capsys.readouterr().err == "2025-09-24 10:30:00,123 - INFO - batch_processor - message\n"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("mongodb://user:hunter2@host:27017/db", "mongodb://***@host:27017/db"),
        ("mongodb+srv://user:hunter2@host", "mongodb+srv://***@host"),
        ("HTTPS://hunter2@host/path", "HTTPS://***@host/path"),
        ("mongodb://user:hunt@er2@host", "mongodb://***@host"),
        ("http://host/a@b", "http://host/a@b"),
        ("mongodb://localhost:27017", "mongodb://localhost:27017"),
        ("write to a@b.example", "write to a@b.example"),
    ],
)
def test_credentials_in_addresses_are_masked(address: str, shown: str) -> None:
    """Whatever put them into the message; the rest of the address stays readable."""
    assert message_of("cannot reach %s, is it up?", address) == f"cannot reach {shown}, is it up?"


def test_two_addresses_in_one_line() -> None:
    """Each on its own."""
    assert message_of("http://a:b@c and http://d:e@f") == "http://***@c and http://***@f"


def test_secrets_are_masked_everywhere() -> None:
    """In messages, arguments and tracebacks; an empty secret masks nothing."""
    assert message_of("key %s, key=sk-123x", "sk-123", secrets=("sk-123", "")) == "key ***, key=***x"
    try:
        raise ValueError("sk-123 in an error")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "x.py", 1, "failed", None, sys.exc_info())
    line = SafeFormatter(["sk-123"]).format(record)
    assert "ValueError: *** in an error" in line
    assert "sk-123" not in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("a\r\n2025-09-24 10:30:00,123 - ERROR - forged", "a\\r\\n2025-09-24 10:30:00,123 - ERROR - forged"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("nul\x00bell\x07", "nul\\x00bell\\x07"),
        ("\x85\u2028\u2029", "\\x85\\u2028\\u2029"),
        ("right\u202eleft", "right\\u202eleft"),
        ("lone \ud83d", "lone \\ud83d"),
        ("naïve 📦 日本", "naïve 📦 日本"),
    ],
)
def test_one_line_per_record(value: str, shown: str) -> None:
    """A value cannot forge a line or steer a terminal; readable text stays."""
    assert message_of("value %s", value) == f"value {shown}"
    line_of("value %s", value, name=value).encode()


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    """Less severe lines are left out; chatty libraries are heard from WARNING on."""
    configure_logging("INFO")
    logging.getLogger("batch_processor").debug("left out")
    logging.getLogger("pymongo.command").info("left out: it may hold a document")
    logging.getLogger("pymongo").warning("kept")
    logging.getLogger("worker.run").info("kept too")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" - ", 1)[1] for line in lines] == [
        "WARNING - pymongo - kept",
        "INFO - worker.run - kept too",
    ]


def test_a_second_call_replaces_the_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No line twice, no file left open."""
    configure_logging("INFO", file=tmp_path / "first.log")
    configure_logging("INFO")
    logging.getLogger("a").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "first.log").read_text() == ""


def test_file_is_created_with_its_folder_and_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines as on stderr, a bounded number of files."""
    monkeypatch.setattr("logger.MAX_LOG_BYTES", 200)
    file = tmp_path / "logs" / "run.log"
    configure_logging("INFO", file=file, secrets=["sk-123"])
    for number in range(50):
        logging.getLogger("a").info("line %d of sk-123", number)
    assert file.read_text().endswith(" - INFO - a - line 49 of ***\n")
    assert len(list(file.parent.iterdir())) == KEPT_LOGS + 1


def test_lines_go_to_the_current_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar replaces it while it is drawn."""
    configure_logging("INFO")
    bar = io.StringIO()
    monkeypatch.setattr(sys, "stderr", bar)
    logging.getLogger("a").info("above the bar")
    assert bar.getvalue().endswith(" - INFO - a - above the bar\n")
