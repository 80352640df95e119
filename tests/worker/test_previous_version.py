"""The state directory of a killed worker of the previous version is picked up.

``previous_version/`` was written by the code before it was divided into packages: a run over
``documents_of_all_shapes(24)`` in batches of 4, killed after it had saved its first retry file. Document 1 had two
unusable answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.worker.site import Site, calls, check_exactly_once, documents_of_all_shapes, user_message

SAVED = Path(__file__).parent / "previous_version"


def answered_in_journals() -> set[int]:
    """Return the ids of documents whose answers are in the journals."""
    lines = [line for path in SAVED.glob("pending/*.journal") for line in path.read_text().splitlines()]
    return {event["id"] for event in map(json.loads, lines) if event["e"] == "answered"}


def place_state(site: Site) -> None:
    """Copy the files, private as a worker's are; the checkpoint names the collection of this test."""
    shutil.copytree(SAVED, site.directory)
    (info,) = site.database.list_collections(filter={"name": site.source.name})
    path = site.directory / "checkpoint.json"
    checkpoint = json.loads(path.read_text())
    checkpoint["source"] = f"{site.source.full_name} -> {site.results.name} ({info['info']['uuid'].hex()})"
    path.write_text(json.dumps(checkpoint))
    for file in site.directory.rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)


def test_state_of_the_previous_version_is_resumed(site: Site) -> None:
    """The job goes on under its id, journaled answers are not asked again, and the retry file gets its round."""
    documents = documents_of_all_shapes(24)
    site.source.insert_many(documents)
    place_state(site)
    answered = answered_in_journals()
    assert answered
    ended = site.run("--logs", "--batch-size", "4")
    assert ended.code == 0, ended.err
    check_exactly_once(site, documents)
    asked = {document["_id"]: calls(site, document) for document in documents if user_message(document) is not None}
    assert {name: 0 if name in answered else 1 for name in asked} == asked
    saved = json.loads((SAVED / "checkpoint.json").read_text())
    assert site.results.distinct("processing_metadata.batch_job_id") == [saved["job_id"]]
    assert json.loads((site.directory / "worker.json").read_text()) == json.loads((SAVED / "worker.json").read_text())
