"""--output is checked before the run: a long run must not end with a file that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

import cli
from error_handler import ExitCode


@pytest.mark.parametrize("name", ["missing/run.json", ".", "/proc/run.json"])
@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--embedded"]], ids=str)
def test_output_that_cannot_be_written_ends_the_run_before_it_starts(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server is asked: the one of this address would be an error with another exit code."""
    monkeypatch.setenv("MONGODB_URI", "mongodb://127.0.0.1:9")
    code = cli.main([*flags, "--output", str(tmp_path / name), "--batch-files-dir", str(tmp_path / "state")])
    assert code == ExitCode.CONFIGURATION
    assert "--output" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
