"""What docs/backup.md promises: after an old copy was restored, runs lose nothing and store nothing twice."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from error_handler import ExitCode
from tests.worker.site import Site, check_exactly_once, documents_of_all_shapes, model_of, requests, until

Backup = dict[str, list[dict[str, Any]]]
COUNT = 80


def killed_run(site: Site) -> list[dict[str, Any]]:
    """Store documents, kill a worker in the middle of its run, and return the documents."""
    documents = documents_of_all_shapes(COUNT)
    site.source.insert_many(documents)
    model_of(site).configure(latency_s=0.1)
    with site.start() as worker:
        until(lambda: site.results.count_documents({}) >= 10)
        worker.send(signal.SIGKILL)
    model_of(site).configure(latency_s=0)
    assert site.results.count_documents({}) < 60
    assert site.files("pending/*.json")
    return documents


def backup_of(site: Site, *names: str) -> Backup:
    """Return the content of the collections *names*; of all if none is given."""
    return {name: list(site.database[name].find()) for name in names or site.database.list_collection_names()}


def restore(site: Site, backup: Backup) -> None:
    """Replace the content of the collections."""
    for name, documents in backup.items():
        site.database[name].delete_many({})
        if documents:
            site.database[name].insert_many(documents)


@pytest.fixture
def old_directory(tmp_path: Path) -> Path:
    """Where the copy of the state directory is kept."""
    return tmp_path / "copy"


@pytest.mark.slow
def test_old_state_directory_costs_no_call(site: Site, old_directory: Path) -> None:
    """Its batches and answers are known to MongoDB by now."""
    documents = killed_run(site)
    shutil.copytree(site.directory, old_directory)
    assert site.run().code == ExitCode.DONE
    check_exactly_once(site, documents)
    calls = requests(site)
    shutil.rmtree(site.directory)
    shutil.copytree(old_directory, site.directory)
    assert site.run().code == ExitCode.DONE
    check_exactly_once(site, documents)
    assert requests(site) == calls


@pytest.mark.thorough
def test_old_results_and_old_state_directory(site: Site, old_directory: Path) -> None:
    """The run names the documents whose results are gone, and --only elsewhere labels them; no other is asked again."""
    documents = killed_run(site)
    shutil.copytree(site.directory, old_directory)
    backup = backup_of(site, "sentimental_analysis")
    assert site.run().code == ExitCode.DONE
    shutil.rmtree(site.directory)
    shutil.copytree(old_directory, site.directory)
    restore(site, backup)
    calls, kept = requests(site), site.results.count_documents({})
    ended = site.run()
    assert "--only elsewhere" in ended.out
    assert site.run("--only", "elsewhere").code == ExitCode.DONE
    check_exactly_once(site, documents)
    assert requests(site) - calls <= COUNT - kept


@pytest.mark.thorough
def test_old_database_and_new_state_directory(site: Site) -> None:
    """Leases and heartbeats of a worker that no longer runs are in it as well."""
    documents = killed_run(site)
    backup = backup_of(site)
    assert site.run().code == ExitCode.DONE
    restore(site, backup)
    kept = len(backup["sentimental_analysis"])
    calls = requests(site)
    assert site.run().code == ExitCode.DONE
    check_exactly_once(site, documents)
    assert requests(site) - calls <= COUNT - kept


@pytest.mark.slow
def test_dropped_and_restored_database_needs_a_new_state_directory(site: Site) -> None:
    """Unfinished work of the dropped collection is refused; a new worker waits for the leases of the old one."""
    site.settings["LEASE_S"] = "1"
    documents = killed_run(site)
    backup = backup_of(site)
    for name in backup:
        site.database[name].drop()
    restore(site, backup)
    ended = site.run()
    assert ended.code == ExitCode.CONFIGURATION
    assert "holds unfinished work of" in ended.err
    assert "--batch-files-dir" in ended.err
    new = site.sibling("new_batch_files")
    until(lambda: new.run().code == ExitCode.DONE and not new.database["conversation_set_leases"].count_documents({}))
    check_exactly_once(new, documents)
