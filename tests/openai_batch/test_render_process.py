"""Templates and functions that do not end or take all memory: one document fails, the next one succeeds."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, Int64, ObjectId, Regex

from error_handler import JobProcessingError, JobTemplateError
from openai_batch import render_process
from openai_batch.render_process import RenderProcess
from tests.cases import mostly_thorough
from tests.worker.site import ROOT, until


class ForeignError(Exception):
    """An exception that the product does not know."""


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
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[RenderProcess]:
    """On a busy machine, the usual time limit could end a function before what it is here for."""
    monkeypatch.setattr(render_process, "TIME_LIMIT_S", 60.0)
    functions = {function.__name__: function for function in (*BAD, environment, open_files, same, pid)}
    with RenderProcess(lambda: functions) as process:
        yield process


def check_failure(process: RenderProcess, function: Callable[[Any], Any], problem: str) -> None:
    """Check that *function* fails one document, without quoting it, and that the next one succeeds."""
    with pytest.raises(JobProcessingError) as caught:
        process.call(function.__name__, {"text": "secret"})
    assert str(caught.value).startswith(f"{function.__name__} {problem}")
    assert caught.value.is_final
    assert "customer" not in str(caught.value)
    assert process.call("same", {"a": 1}) == {"a": 1}


@pytest.mark.parametrize("function", mostly_thorough(BAD, 2), ids=lambda function: function.__name__)
def test_bad_function_fails_one_document(function: Callable[[Any], Any], process: RenderProcess) -> None:
    """AT-20: with one sentence, and the next document succeeds."""
    check_failure(process, function, BAD[function])


@pytest.mark.parametrize(
    "function", mostly_thorough([endless_in_c, endless, asleep], 3), ids=lambda function: function.__name__
)
def test_endless_function_fails_one_document(function: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """AT-20: the kernel ends it, in Python as well as in C."""
    monkeypatch.setattr(render_process, "TIME_LIMIT_S", 0.5)
    with RenderProcess(lambda: {function.__name__: function, "same": same}) as process:
        check_failure(process, function, "takes longer than 0.5 s")


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


@pytest.mark.thorough
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


def test_close_during_a_call_ends_the_child_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled run closes while a thread is in the middle of a page of answers; its next call fails."""
    os.mkfifo(tmp_path / "started")
    killed: list[int] = []
    kill = os.kill

    def recorded(pid: int, number: int) -> None:
        killed.append(pid)
        if pid > 0:  # 0 is this process and everything that it started
            kill(pid, number)

    def slow(_: Any) -> None:
        (tmp_path / "started").write_text("")
        time.sleep(0.2)

    monkeypatch.setattr(os, "kill", recorded)
    problems: list[str] = []

    def work() -> None:
        for _ in range(2):
            try:
                process.call("slow", {})
            except JobProcessingError as exc:
                problems.append(str(exc))

    with RenderProcess(lambda: {"slow": slow}) as process:
        thread = threading.Thread(target=work)
        thread.start()
        (tmp_path / "started").read_text()
    thread.join()
    assert problems == ["slow is not called any more: the job has ended"]
    assert len(killed) == 1
    assert killed[0] > 0


def test_child_is_replaced_while_sigchld_is_ignored(process: RenderProcess) -> None:
    """Some supervisors start programs that way; then the kernel collects dead children itself."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        child = process.call("pid", {})
        os.kill(child, signal.SIGKILL)
        assert process.call("pid", {}) != child
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_failed_fork_is_one_sentence(process: RenderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has no process or memory left; the next call starts a child again."""

    def failing() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    os.kill(process.call("pid", {}), signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", failing)
        with pytest.raises(JobTemplateError, match=r"can be started \(Resource temporarily unavailable\)"):
            process.call("same", {"a": 1})
    assert process.call("same", {"a": 1}) == {"a": 1}


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
    """An endless function would cost two seconds for each of 100,000 documents. A success resets the count."""
    monkeypatch.setattr(render_process, "MAX_DEATHS_IN_A_ROW", 2)
    with RenderProcess(lambda: {"crash": crash, "same": same}) as process:
        for name in ("crash", "same", "crash"):
            with nullcontext() if name == "same" else pytest.raises(JobProcessingError):
                process.call(name, {})
        with pytest.raises(JobTemplateError, match="2 documents in a row"):
            process.call("crash", {})


def test_failing_setup_raises_in_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason; no process is left behind."""
    monkeypatch.setattr(render_process, "TIME_LIMIT_S", 0.5)
    children: list[int] = []
    fork = os.fork

    def recorded() -> int:
        child = fork()
        children.append(child)
        return child

    monkeypatch.setattr(os, "fork", recorded)

    def refused() -> dict[str, Any]:
        raise JobTemplateError("system_prompt, line 1: no template")

    def endless_parts() -> dict[str, Any]:
        while True:
            pass

    with pytest.raises(JobTemplateError, match="system_prompt, line 1"):
        RenderProcess(refused)
    with pytest.raises(JobTemplateError, match=r"0\.5 s"):
        RenderProcess(endless_parts)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert len(children) == 2
