"""The Makefile installs into .venv, whatever pip's settings for other places are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAND_IN = """#!/bin/sh
case "$*" in *install*) echo "user=$PIP_USER target=$PIP_TARGET prefix=$PIP_PREFIX root=$PIP_ROOT" >> seen;; esac
"""


@pytest.mark.parametrize("name", ["PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"])
def test_settings_of_pip_do_not_redirect_the_installation(name: str, tmp_path: Path) -> None:
    """A fake interpreter in .venv records the environment of pip; PIP_USER=0 also overrules pip.conf."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = os.environ | {name: "1"}
    subprocess.run(["make", "venv"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert set((tmp_path / "seen").read_text().splitlines()) == {"user=0 target= prefix= root="}


@pytest.mark.parametrize(
    ("failing", "message"),
    [("*pip==*", "Continuing with the version of pip"), ("*requirements-embedding*", "Continuing without it")],
    ids=["pip", "classifier"],
)
def test_optional_package_that_cannot_be_installed_does_not_stop_the_installation(
    failing: str, message: str, tmp_path: Path
) -> None:
    """A mirror may lack the version of pip. There are no wheels of tokenizers for some platforms; phrases label there."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$*" in {failing}) exit 1;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "venv"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert message in done.stderr
    assert (tmp_path / ".venv/run.stamp").exists()
