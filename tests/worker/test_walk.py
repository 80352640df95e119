"""docs/architecture.md draws the walk of one document as the profiler records it."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.walk import MAX_FOLDER_ARROWS, MAX_MODULES, Walk, record

ARCHITECTURE = Path(__file__).parents[2] / "docs/architecture.md"


def drawn_modules() -> set[str]:
    """Return the modules in the drawing: the first word of each of its lines."""
    section = ARCHITECTURE.read_text(encoding="utf-8").split("## The walk of one document")[1]
    drawing = section.split("```")[1]
    return {name.replace("/", ".") for name in re.findall(r"^ *([\w/]+)", drawing, re.MULTILINE)}


def test_architecture_page_draws_the_recorded_walk(mongodb_uri: str) -> None:
    """It names each module that one document enters, and no other; there are no more than the limits allow."""
    walk = record(mongodb_uri)
    assert set(walk.modules) == drawn_modules()
    assert (len(walk.modules) <= MAX_MODULES, len(walk.folder_arrows) <= MAX_FOLDER_ARROWS) == (True, True)
    assert walk.calls[0][3] == "DocumentStore.read_page"
    assert {"DocumentStore.write_results", "DocumentStore.release", "BatchJournal.add"} <= {
        function for *_, function in walk.calls
    }


def test_arrow_counts_once_and_not_inside_a_module() -> None:
    """Folder arrows are those between folders, and the top level is one of them."""
    calls = [
        ("task", "worker.run", "worker.run", "a"),
        ("task", "worker.run", "worker.intake", "b"),
        ("task", "worker.intake", "mongo_client", "c"),
        ("task", "worker.intake", "mongo_client", "d"),
        ("task", "mongo_client", "classifier", "e"),
    ]
    walk = Walk(calls)
    assert walk.modules == ["worker.run", "worker.intake", "mongo_client", "classifier"]
    assert walk.arrows == [
        ("worker.run", "worker.intake"),
        ("worker.intake", "mongo_client"),
        ("mongo_client", "classifier"),
    ]
    assert walk.folder_arrows == [("worker.intake", "mongo_client")]
    assert walk.raw_changes == (3, 1)
