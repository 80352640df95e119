"""Templates and functions that do not end or take all memory: one document fails, the next one succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, Int64, ObjectId, Regex

from error_handler import JobProcessingError, JobTemplateError
from openai_batch import render_process
from openai_batch.render_process import MAX_DEATHS_IN_A_ROW, RenderProcess
from tests.worker.site import ROOT, until


class ForeignError(Exception):
    """Nobody has heard of it."""


def endless(_: Any) -> None:
    while True:
        pass


def endless_in_c(_: Any) -> int:
    return sum(iter(int, 1))


def asleep(_: Any) -> None:
    time.sleep(100)


def greedy(_: Any) -> int:
    return len(bytearray(10**10))


def greedy_by_a_little(_: Any) -> int:
    return len(bytearray(3 * 10**8))


def greedy_by_and_by(_: Any) -> list[str]:
    kept: list[str] = []
    while True:
        kept.append("x" * 2 * 10**7)


def crash(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(_: Any) -> None:
    sys.exit(3)


def foreign(_: Any) -> None:
    raise ForeignError("the text of a customer")


def interrupted(_: Any) -> None:
    raise KeyboardInterrupt


def unstorable(_: Any) -> Any:
    return {"x": object()}


def too_long(_: Any) -> str:
    return "x" * 21_000_000


def environment(_: Any) -> dict[str, str]:
    return dict(os.environ)


def open_files(_: Any) -> list[str]:
    files = []
    for entry in Path("/proc/self/fd").iterdir():
        if entry.exists() or entry.is_symlink():
            files.append(f"{entry.name} {os.readlink(entry)}" if entry.is_symlink() else entry.name)
    return files


def same(value: Any) -> Any:
    return value


def pid(_: Any) -> int:
    return os.getpid()


BAD: dict[Callable[[Any], Any], str] = {
    endless: "takes longer than 2 s",
    endless_in_c: "takes longer than 2 s",
    asleep: "takes longer than 2 s",
    greedy: "takes more than 100 MB of memory",
    greedy_by_a_little: "takes more than 100 MB of memory",
    greedy_by_and_by: "takes more than 100 MB of memory",
    crash: "ended its process (SIGSEGV)",
    leave: "failed (SystemExit)",
    foreign: "failed (ForeignError)",
    interrupted: "failed (KeyboardInterrupt)",
    unstorable: "returns a value that MongoDB cannot store",
    too_long: "returns more than 20 MB",
}


@pytest.fixture
def process() -> Iterator[RenderProcess]:
    functions = {function.__name__: function for function in (*BAD, environment, open_files, same, pid)}
    with RenderProcess(lambda: functions) as process:
        yield process


@pytest.mark.parametrize("function", BAD, ids=lambda function: function.__name__)
def test_bad_function_fails_one_document(function: Callable[[Any], Any], process: RenderProcess) -> None:
    """AT-20: with one sentence without the document's text; the next document succeeds."""
    before = time.monotonic()
    with pytest.raises(JobProcessingError) as caught:
        process.call(function.__name__, {"text": "secret"})
    assert str(caught.value).startswith(f"{function.__name__} {BAD[function]}")
    assert caught.value.is_final
    assert "customer" not in str(caught.value)
    assert process.call("same", {"a": 1}) == {"a": 1}
    assert time.monotonic() - before < 30


def test_function_beyond_the_time_limit_is_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's timer ends the child; if the parent had to, the document would be tried a second time."""
    monkeypatch.setattr(render_process, "TIME_LIMIT_S", 0.2)
    started = tmp_path / "started"

    def noted(_: Any) -> None:
        with started.open("a") as file:
            file.write("once\n")
        endless(None)

    with RenderProcess(lambda: {"noted": noted}) as process, pytest.raises(JobProcessingError, match=r"0\.2 s"):
        process.call("noted", {})
    assert started.read_text() == "once\n"


def test_values_keep_their_types(process: RenderProcess) -> None:
    """Values that look like Extended JSON stay as they are."""
    document = {
        "_id": ObjectId(),
        "long": Int64(5),
        "date": datetime(2026, 1, 2, 3, 4, 5, 6000, tzinfo=UTC),
        "decimal": Decimal128("1.50"),
        "binary": b"\x00\xff",
        "regex": Regex("a+"),
        "looks": {"$oid": "no id", "$numberLong": {"$gt": ""}, "a.b": 1},
    }
    assert process.call("same", document) == document
    assert type(process.call("same", document)["long"]) is Int64


def test_child_inherits_no_setting_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key in its environment, and no lock of the parent."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setenv("MONGODB_URI", "mongodb://user:canary@host")
    monkeypatch.setenv("OF_SOMEBODY_ELSE", "stays")
    with (tmp_path / "lock").open("w"), RenderProcess(lambda: {"environment": environment, "open": open_files}) as own:
        variables = own.call("environment", {})
        assert "canary" not in str(variables)
        assert variables["OF_SOMEBODY_ELSE"] == "stays"
        assert "lock" not in str(own.call("open", {}))


def test_child_dies_with_its_killed_parent() -> None:
    """In the middle of an endless document as well."""
    script = (
        "import os, sys\n"
        "from openai_batch.render_process import RenderProcess\n"
        "def endless(_):\n"
        "    import signal, time\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0)  # its own clock is not what ends it\n"
        "    print(os.getpid(), file=sys.stderr, flush=True)\n"
        "    while True: time.sleep(1)\n"
        "RenderProcess(lambda: {'endless': endless}).call('endless', {})\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        child = int(parent.stderr.readline())
        parent.kill()
        until(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_terminal_signals_do_not_end_the_child(process: RenderProcess) -> None:
    """Ctrl-C reaches the whole process group; the parent decides when to stop."""
    child = process.call("pid", {})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    assert process.call("pid", {}) == child


def test_killed_child_is_replaced_and_no_document_fails(process: RenderProcess) -> None:
    """As the system kills it when memory runs out."""
    child = process.call("pid", {})
    os.kill(child, signal.SIGKILL)
    assert process.call("pid", {}) != child


def test_fork_beside_threads_works_without_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Python 3.12 and later warn of it."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with RenderProcess(lambda: {"same": same}) as process:
            assert process.call("same", {"a": 1}) == {"a": 1}
    finally:
        done.set()
        thread.join()
    assert list(recwarn) == []


def test_many_deaths_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless function would cost two seconds for each of 100,000 documents."""
    monkeypatch.setattr(render_process, "TIME_LIMIT_S", 0.05)
    with RenderProcess(lambda: {"endless": endless, "same": same}) as process:
        for _ in range(MAX_DEATHS_IN_A_ROW - 1):
            with pytest.raises(JobProcessingError):
                process.call("endless", {})
        process.call("same", {})
        for _ in range(MAX_DEATHS_IN_A_ROW - 1):
            with pytest.raises(JobProcessingError):
                process.call("endless", {})
        with pytest.raises(JobTemplateError, match="20 documents in a row"):
            process.call("endless", {})


def test_failing_setup_raises_in_the_parent() -> None:
    """With the reason; no process is left behind."""

    def refused() -> dict[str, Any]:
        raise JobTemplateError("system_prompt, line 1: no template")

    def endless_parts() -> dict[str, Any]:
        while True:
            pass

    with pytest.raises(JobTemplateError, match="system_prompt, line 1"):
        RenderProcess(refused)
    with pytest.raises(JobTemplateError, match="2 s"):
        RenderProcess(endless_parts)
