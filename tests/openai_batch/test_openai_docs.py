"""The tutorial of document jobs runs as written, against the fake OpenAI and a real MongoDB."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from error_handler import ExitCode
from openai_batch import (
    AppConfig,
    BatchConfig,
    DatabaseConfig,
    DocumentFields,
    NotificationConfig,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
    StatusConfig,
)
from openai_batch.ledger import ShardState
from openai_batch.notifications import signature
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import run_forked
from tests.openai_batch.openai_job import ROOT, Job

PAGE = (ROOT / "docs/openai-batch.md").read_text(encoding="utf-8")
TUTORIAL = PAGE.split("## From zero to a finished batch")[1].split("\n## ")[0]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
URI = "mongodb://localhost:27017"


def shown_commands() -> list[tuple[str, list[str]]]:
    """Each ``$ python cli.py`` of the tutorial with the lines shown below it."""
    shown: list[tuple[str, list[str]]] = []
    for kind, text in BLOCK.findall(TUTORIAL):
        for line in text.splitlines() if kind == "console" else ():
            if line.startswith("$ "):
                shown.append((line[2:], []))
            else:
                shown[-1][1].append(line)
    return [(command, lines) for command, lines in shown if command.startswith("python cli.py")]


def python_blocks(text: str = TUTORIAL) -> list[str]:
    return [block for kind, block in BLOCK.findall(text) if kind == "python"]


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    found = re.search(r"fake_openai\.py --port 8600 --knobs '(.*)'", TUTORIAL)
    assert found is not None
    with FakeOpenAI(**json.loads(found[1])) as server:
        yield server


@pytest.mark.thorough
def test_tutorial_runs_as_written(mongodb_uri: str, db_name: str, tmp_path: Path, fake: FakeOpenAI) -> None:
    """Every command and Python block in order; the outputs are those of the page."""
    insert, in_python = (
        block.replace(URI, mongodb_uri).replace('"clinic"', f'"{db_name}"') for block in python_blocks()
    )

    with Job(mongodb_uri, db_name, fake.url, tmp_path, collection="events") as job:

        def run(command: list[str], **changes: str) -> str:
            ended = run_forked(command, job.environment(**changes), ROOT)
            assert ended.returncode == 0, ended.stderr
            return ended.stdout

        database = job.client[db_name]
        run(["-c", insert])
        (dry_run, lines), *steps = shown_commands()
        out = run(shlex.split(dry_run)[1:], OPENAI_BASE_URL="", OPENAI_API_KEY="")
        assert out.startswith("\n".join(lines[: lines.index("  ...")]))
        assert out.endswith("\n".join(lines[lines.index("  ...") + 1 :]) + "\n")
        assert [shlex.split(command)[3] for command, _ in steps] == ["submit", "poll", "run"]
        for command, lines in steps:
            out = run(shlex.split(command)[1:])
            for line in lines:
                assert _without_ids(line) in _without_ids(out)
        assert {event["ai_status"] for event in database["events"].find()} == {"completed"}
        first = database["events"].find_one({"_id": 0})
        assert first is not None
        assert set(re.findall(r"'(\w+)':", TUTORIAL)) >= _names(first)
        database["visits"].insert_one({"ai_status": "pending", "notes": [{"text": "A note."}]})
        assert run(["-c", in_python]) == "1 1 0\n"
        visit = database["visits"].find_one({})
        assert visit is not None
        assert visit["summary"]["talking_points"]["length"] > 0
    assert fake.stats()["max_billed_per_body"] == 1


def _without_ids(text: str) -> str:
    text = re.sub(r"batch_[0-9a-f]+", "batch_", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def _names(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    return set(value) | {name for inner in value.values() for name in _names(inner)}


def test_signature_recipe_accepts_genuine_ones_only() -> None:
    """It refuses changed and old bodies and other keys."""
    (recipe,) = (block for block in python_blocks(PAGE) if "is_genuine" in block)
    names: dict[str, Any] = {}
    exec(recipe, names)
    is_genuine: Callable[[str, str, bytes], bool] = names["is_genuine"]
    now, body = int(time.time()), b'{"status":"completed"}'
    assert is_genuine("key", signature("key", now, body), body)
    assert not is_genuine("other", signature("key", now, body), body)
    assert not is_genuine("key", signature("key", now, body), body + b" ")
    assert not is_genuine("key", signature("key", now - 3600, body), body)


@pytest.mark.parametrize(
    "part",
    [
        AppConfig,
        BatchConfig,
        DatabaseConfig,
        DocumentFields,
        NotificationConfig,
        OpenAIConfig,
        PromptConfig,
        SchemaConfig,
        StatusConfig,
    ],
)
def test_every_configuration_field_is_documented(part: Any) -> None:
    """In the row of its object."""
    section = PAGE.split("## Configuration")[1].split("\n## ")[0]
    rows = section.split(f"| `{part.__name__}` |")[1].split("\n| `")[0]
    objects = {"schema_config", "fields", "prompts", "database", "openai", "batch", "notifications"}
    fields = set(part.model_fields) - (objects if part is AppConfig else set())
    assert {name for name in fields if f"`{name}`" not in rows} == set()


def test_every_state_and_exit_code_is_documented() -> None:
    """In the drawing and in the tables."""
    section = PAGE.split("## States and recovery")[1].split("\n## ")[0]
    drawing = section.split("```mermaid")[1].split("```")[0]
    for state in ShardState:
        assert f"--> {state.name}" in drawing
        assert f"| `{state.name}` |" in section
    codes = PAGE.split("## Actions and exit codes")[1].split("\n## ")[0]
    for code in set(ExitCode) - {ExitCode.FAILURE_THRESHOLD}:
        assert f"| {code.value} |" in codes
