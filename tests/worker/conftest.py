"""One replica set for the tests of the mode stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedded.replica_set import ReplicaSetMongod


@pytest.fixture(scope="package")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaSetMongod]:
    """Return a replica set of one for the tests of this folder."""
    with ReplicaSetMongod(tmp_path_factory.mktemp("members")) as server:
        yield server
