"""The sample database for first steps."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from database_docs.introspection import read_database
from database_docs.sample_database import make_sample_database
from error_handler import ConfigurationError


def test_the_sample_is_a_database_with_sound_foreign_keys(tmp_path: Path) -> None:
    """Every relationship refers to an existing table and existing columns."""
    path = tmp_path / "new" / "sample.db"
    make_sample_database(path)
    facts = read_database(SecretStr(f"sqlite:///{path}"))
    columns = {table.full_name: {column.name for column in table.columns} for table in facts.tables}
    assert len(columns) >= 12
    assert {"customers", "orders", "refunds", "support_tickets"} <= columns.keys()
    assert len(facts.relationships) >= 15
    for key in facts.relationships:
        assert set(key.referred_columns) <= columns[key.referred_table]
        assert key.referred_columns
    assert "one-to-one" in {key.relationship_type for key in facts.relationships}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_can_be_made_again_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "sample.db"
    make_sample_database(path)
    make_sample_database(path)
    assert [file.name for file in tmp_path.iterdir()] == ["sample.db"]


@pytest.mark.parametrize("content", ["database", "text"])
def test_no_other_file_is_replaced(tmp_path: Path, content: str) -> None:
    """This protects the user's own database."""
    path = tmp_path / "mine.db"
    if content == "text":
        path.write_text("my notes")
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE mine (id)")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="move it away"):
        make_sample_database(path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        make_sample_database(tmp_path / "file" / "sample.db")
