"""A run of cli.py against a model server that the caller names in the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.forked_process import run_forked

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data/sample_conversations.jsonl"


def run_worker(
    tmp_path: Path,
    mongodb_uri: str,
    db_name: str,
    environment: dict[str, str],
    *flags: str,
    timeout_s: float = 110.0,
) -> dict[str, Any]:
    """Run cli.py to its end and return its statistics; a failure shows what it said."""
    output = tmp_path / "stats.json"
    command: list[str | Path] = [
        ROOT / "cli.py",
        "--mongodb-uri",
        mongodb_uri,
        "--db-name",
        db_name,
        "--output",
        output,
    ]
    command += ["--batch-files-dir", tmp_path / "batch_files", *flags]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OLLAMA", "LLM", "MONGODB"))}
    done = run_forked(command, clean | environment, tmp_path, timeout_s)
    assert done.returncode == 0, done.stderr
    stats: dict[str, Any] = json.loads(output.read_text())
    return stats
