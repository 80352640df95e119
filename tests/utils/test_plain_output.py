"""A terminal, pipe or locale that is not UTF-8 gets plain characters, and the run goes on."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from commands.summary import print_examples, print_labels
from tests.worker.site import ROOT, Site, WorkerProcess, conversation
from utils.process import exit_code_of

LABELS = {"intent": {"Complaint": 9, "Refund Request": 1}}


def written(encoding: str, write: Callable[[], None], monkeypatch: pytest.MonkeyPatch, errors: str = "strict") -> str:
    """Return what *write* gave to a stdout of *encoding*."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))

    def run() -> int:
        write()
        sys.stdout.flush()
        return 0

    assert exit_code_of(run, "test", verbose=False) == 0
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "errors"),
    [("ascii", "surrogateescape"), ("latin-1", "strict"), ("cp1252", "strict"), ("koi8-u", "strict")],
)
def test_bars_are_plain_characters(encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C locale has ascii with surrogateescape, which refuses blocks as well."""
    text = written(encoding, lambda: print_labels(Console(), LABELS), monkeypatch, errors)
    assert "Complaint" in text
    assert ("#" * 25 in text) or ("█" * 25 in text and encoding == "koi8-u")


def test_labels_of_another_script_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost: the escapes can be read again."""
    labels = dict.fromkeys(("intent", "topic", "sentiment"), "Жалоба") | {"categorization": "退款 💶 …"}
    results = [{"conversation_number": "1", "classification": labels}]
    text = written("ascii", lambda: print_examples(Console(width=200), results), monkeypatch)
    assert "\\u0416" in text
    assert "..." in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for characters beyond the first plane, and for half of a surrogate pair, which UTF-8 refuses."""
    value = {"text": "Größe 💶 退款 \ud83d"}
    text = written(encoding, lambda: print(json.dumps(value, ensure_ascii=False)), monkeypatch)
    assert json.loads(text) == value


def test_unbuffered_output_is_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes a part in one call: here because the pipe is full, on a terminal because of any signal."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    text = "x" * 300_000
    with open(ours, "rb") as reader, ThreadPoolExecutor(1) as pool:
        with io.TextIOWrapper(io.FileIO(theirs, "wb"), "utf-8", write_through=True) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            read = pool.submit(reader.read)
            assert exit_code_of(lambda: print(text, end="") or 0, "test", verbose=False) == 0
        assert read.result() == text.encode()


@pytest.mark.thorough
def test_run_in_the_c_locale_ends_well(site: Site) -> None:
    """A whole process, because the interpreter chooses the encoding."""
    site.source.insert_many([conversation(number) for number in range(3)])
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-X", "utf8=0", str(ROOT / "cli.py"), "--console"]
    with WorkerProcess(command, site.environment(**locale), site.folder) as worker:
        ended = worker.ended()
    assert (ended.code, site.results.count_documents({})) == (0, 3), ended.err
    assert "###" in ended.out
