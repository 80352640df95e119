"""Each program in its own interpreter with warnings as errors; other tests fork them."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import mostly_thorough
from tests.environment import clean_environment
from tests.forked_process import run_forked
from tests.test_import_graph import ENTRY_POINTS

ROOT = Path(__file__).parent.parent
FILES = [Path(*name.split(".")).with_suffix(".py") for name in sorted({"cli", "batch_processor", *ENTRY_POINTS})]


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if file.stem == "cli" else pytest.mark.thorough) for file in FILES],
    ids=str,
)
def test_program_starts_in_any_folder(file: Path, tmp_path: Path) -> None:
    """A forked process prints the same."""
    command = [ROOT / file, "--help"]
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    forked = run_forked(command, clean_environment(), tmp_path)
    assert (forked.returncode, forked.stdout, forked.stderr) == (0, done.stdout, "")


@pytest.mark.parametrize("file", mostly_thorough(FILES, 2), ids=str)
def test_program_without_its_packages_ends_with_one_sentence(file: Path, tmp_path: Path) -> None:
    """The system's Python has none; -S leaves out those of this one."""
    done = subprocess.run(
        [sys.executable, "-S", ROOT / file, "--help"],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{file.name}: {sys.executable} lacks the packages of requirements.txt: ")
    assert ". .venv/bin/activate" in line


@pytest.mark.parametrize(
    "module",
    mostly_thorough(
        ["benchmarks", *(f"benchmarks.{name}" for name in "train_embedded baseline_accuracy embedded_speed".split())], 4
    ),
)
def test_benchmark_without_its_packages_ends_with_one_sentence(module: str) -> None:
    """``make venv`` installs those of the product only."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", module],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(module.rpartition(".")[2])
    assert " lacks the packages of requirements.txt: run make venv" in line or ": run make bench ARGS=--help" in line


@pytest.mark.parametrize("file", mostly_thorough(FILES, 3), ids=str)
def test_wrong_flag_is_answered_with_one_line(file: Path, tmp_path: Path) -> None:
    """The usage of all flags would hide it."""
    done = run_forked([ROOT / file, "--file", "x", "--hlp"], clean_environment(), tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "unrecognized arguments: " in line
    assert line.endswith("--help lists the flags.")


def test_service_on_a_port_in_use_names_the_flag(tmp_path: Path) -> None:
    """uvicorn's own exit code 3 means something else here."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_forked([ROOT / "main.py", "--port", str(taken.getsockname()[1])], clean_environment(), tmp_path)
    assert (done.returncode, "choose another --port.\n" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("program", "code"),
    mostly_thorough(
        [
            ("pass", 0),
            ("import sys; sys.exit(5)", 5),
            ("import sys; sys.exit('no')", 1),
            ("raise KeyError('x')", 1),
            ("raise KeyboardInterrupt", -2),
            ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
            ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()", 0),
            ("import atexit; atexit.register(print, 'at exit'); print('before')", 0),
            ("import sys; print(sys.argv, __name__, len(sys.stdin.read()))", 0),
        ],
        4,
    ),
)
def test_forked_program_behaves_like_a_started_one(program: str, code: int, tmp_path: Path) -> None:
    """The fork only saves time."""
    command = ["-c", program, "an argument"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    forked = run_forked(command, clean_environment(), tmp_path)
    assert (forked.returncode, forked.stdout) == (done.returncode, done.stdout)
    assert code == done.returncode
    assert forked.stderr.splitlines()[-1:] == done.stderr.splitlines()[-1:]
