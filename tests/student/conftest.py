"""One trained student for all tests of this folder."""

from __future__ import annotations

import functools
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded.minilm import open_encoder
from embedded.mongod import EmbeddedMongod
from tests.student.student_site import ConsistentModel, fill, student_site
from tests.worker.site import Site

LEARNED = 130


@pytest.fixture(scope="package", autouse=True)
def one_encoder() -> Iterator[None]:
    """Let the runs of this process share one encoder, which keeps no state. Loading it takes 0.3 s of processor time."""
    shared = functools.cache(open_encoder)
    with pytest.MonkeyPatch.context() as patch:
        for place in ("student.built_in", "commands.student_actions", "embedded.embedding_classifier"):
            patch.setattr(f"{place}.open_encoder", shared)
        yield


@pytest.fixture(scope="package")
def trained_directory(mongod: EmbeddedMongod, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student that was trained on LEARNED results, numbers from 0."""
    folder = tmp_path_factory.mktemp("student")
    with student_site(mongod.uri, f"test_{uuid.uuid4().hex[:16]}", folder) as (site, _):
        fill(site, 0, LEARNED)
        assert site.run().code == 0
        ended = site.run("student", "train")
        site.database.client.drop_database(site.database.name)
        assert ended.code == 0, ended.err
        (folder / "trained.txt").write_text(ended.out)
        (folder / "trained.err").write_text(ended.err)
    return folder


@pytest.fixture
def place(mongodb_uri: str, db_name: str, tmp_path: Path) -> Iterator[tuple[Site, ConsistentModel]]:
    """Return an empty site and its model server."""
    with student_site(mongodb_uri, db_name, tmp_path) as opened:
        yield opened


@pytest.fixture
def school(place: tuple[Site, ConsistentModel], trained_directory: Path) -> tuple[Site, ConsistentModel]:
    """Return *place* with the trained student in its state directory."""
    site, _ = place
    shutil.copytree(trained_directory / "batch_files" / "student", site.directory / "student")
    return place
