"""Measures how often a search with the local model finds what a question asks for."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from benchmarks.search_questions import CLINIC, CLINIC_SCHEMA, SHOP, SHOP_SCHEMA, Question
from benchmarks.table import Row, figure
from config.index_settings import load_index_settings
from database_docs.documentation import document_database
from database_docs.introspection import read_database
from database_docs.items import IndexItem
from embedding_index.providers import open_provider
from embedding_index.providers.contract import Provider
from embedding_index.vector_search import query_vector

DATABASES = {"sample": (SHOP_SCHEMA, SHOP), "clinic": (CLINIC_SCHEMA, CLINIC)}
# Minimum shares of the questions whose first hit, or one of the first three, is an answer. The same model and texts give
# the same figures on every machine; the margin is for texts that change for another reason.
MIN_FIRST, MIN_OF_THREE = 0.75, 0.90


def measure(*, quick: bool) -> list[Row]:
    """Ask all questions, or with *quick* the first ten of each database."""
    rows = []
    for name, (schema, questions) in DATABASES.items():
        ranks = ranks_of_answers(schema, questions[: 10 if quick else None])
        first, of_three = (sum(rank <= most for rank in ranks) / len(ranks) for most in (1, 3))
        rows += [
            Row(
                f"search, {name} database, {len(ranks)} questions: first hit is an answer",
                figure(first),
                "",
                "",
                f">= {MIN_FIRST:g}",
                first >= MIN_FIRST,
            ),
            Row(
                "  one of the first three is",
                figure(of_three),
                "",
                "",
                f">= {MIN_OF_THREE:g}",
                of_three >= MIN_OF_THREE,
            ),
        ]
    return rows


def ranks_of_answers(schema: str, questions: Sequence[Question]) -> list[int]:
    """Return, for each of *questions*, the rank (from 1) of the first hit that is an answer.

    The hits are tables and relationships of a database made with the SQL *schema*.
    """
    items = _items(schema)
    provider = open_provider(load_index_settings(None, provider="local"), None)
    vectors = np.array([_unit(provider, item.text) for item in items])
    ranks = []
    for question, answers in questions:
        order = np.argsort(-(vectors @ _unit(provider, question)), kind="stable")
        names = [items[place].name for place in order]
        ranks.append(1 + min(names.index(answer) for answer in answers))
    return ranks


def _items(schema: str) -> list[IndexItem]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        path = Path(folder) / "database.sqlite3"
        with closing(sqlite3.connect(path)) as database:
            database.executescript(schema)
        facts = read_database(SecretStr(f"sqlite:///{path}"))
    return [made.item for part in document_database(facts.tables, facts.relationships) for made in part]


def _unit(provider: Provider, text: str) -> NDArray[np.float32]:
    vector = np.asarray(query_vector(provider, text), np.float32)
    unit: NDArray[np.float32] = vector / np.linalg.norm(vector)
    return unit
