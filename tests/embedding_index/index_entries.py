"""Entries for the tests of the index: vectors that anybody can make again from a number."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from embedding_index.chroma_index import ChromaIndex, Entry
from embedding_index.items import Kind, ModelIdentity
from embedding_index.vector_checks import Vector

DIMENSIONS = 32
MODEL = ModelIdentity("ollama", "nomic-embed-text", DIMENSIONS)
OTHER_MODEL = ModelIdentity("openai", "text-embedding-3-small", DIMENSIONS)


def vector_of(number: int) -> Vector:
    """The vector of entry *number*, not of length one."""
    return np.random.default_rng(number).standard_normal(DIMENSIONS, dtype=np.float32) * 3


def entry(number: int, kind: Kind = Kind.TABLE, *, text: str | None = "a table", **metadata: str | int) -> Entry:
    return Entry(f"{kind}:{number}", vector_of(number), {"number": number, **metadata}, text)


def entries(numbers: Iterable[int]) -> list[Entry]:
    return [entry(number) for number in numbers]


def make_index(folder: Path, numbers: Iterable[int]) -> None:
    """Add *numbers* to the index of *folder* as a writer that ends well."""
    with ChromaIndex(folder, MODEL) as index:
        index.upsert(entries(numbers))


def assert_holds(index: ChromaIndex, numbers: Iterable[int], *, searched_every: int = 1) -> None:
    """Each of *numbers* and no other is in *index* with its vector, and is the first hit of that vector."""
    expected = {f"{Kind.TABLE}:{number}": number for number in numbers}
    assert index.ids() == set(expected)
    assert index.count() == len(expected)
    stored = dict(index.vectors(expected))
    assert stored.keys() == expected.keys()
    wrong = [id_ for id_, number in expected.items() if not np.allclose(stored[id_], vector_of(number), atol=1e-5)]
    assert not wrong
    for number in list(expected.values())[::searched_every]:
        (hit,) = index.search(vector_of(number), limit=1)
        assert (hit.name, hit.metadata["number"]) == (str(number), number)
        assert hit.similarity > 0.9999
