"""The service with a small index: bags of words, from ``index.json`` in the working directory.

``{"items": [{"name", "text", "metadata"}], "is_external": false, "opening": KIND, "search": KIND, "search_s": 0,
"busy_s": null}``; the file is read again for each search. A KIND is one of FAULTS: it is raised there.
``searches.log`` gets a line when a search begins and one when it ends.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import main
from config.service_settings import ServiceSettings
from database_docs.items import Kind
from embedding_index.providers.contract import ModelIdentity
from embedding_index.search_entries import Hit
from error_handler import (
    ConfigurationError,
    MixedIndexError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
    VectorStoreError,
)

FAULTS: dict[str, Exception] = {
    "not installed": ModuleNotFoundError("No module named 'chromadb'", name="chromadb"),
    "wrong key": ConfigurationError("OPENAI_API_KEY is wrong."),
    "other model": MixedIndexError("The index is of another model; rebuild it."),
    "damaged": VectorStoreError("The index cannot be read; rebuild it."),
    "away": ProviderUnavailableError("The provider does not answer."),
    "busy": ProviderBusyError("The provider has no room.", 7.0),
    "refuses": ProviderRejectedError("The provider refuses the text."),
    "unusable": UnusableVectorsError("The provider gave no vector."),
}


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def cosine(one: Counter[str], other: Counter[str]) -> float:
    lengths = math.hypot(*one.values()) * math.hypot(*other.values())
    return sum(count * other[word] for word, count in one.items()) / lengths if lengths else 0.0


@dataclass
class WordProvider:
    is_external: bool
    identity: ModelIdentity


class WordIndex:
    """Finds by common words."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        state = self._state()
        raise_fault(state.get("opening"))
        self.provider = WordProvider(state.get("is_external", False), ModelIdentity("words", "words-1", 1))
        self._log("open")

    def search(self, text: str, kinds: Collection[Kind] | None = None, limit: int = 5) -> list[Hit]:
        assert kinds == [Kind.CONVERSATION]
        self._log("begin")
        state = self._state()
        time.sleep(state.get("search_s", 0))
        self._log("end")
        raise_fault(state.get("search"))
        hits = [
            Hit(Kind.CONVERSATION, item["name"], cosine(words(text), words(item["text"])), item["metadata"])
            for item in state["items"]
        ]
        return sorted(hits, key=lambda hit: -hit.similarity)[:limit]

    def close(self) -> None:
        self._log("close")

    def _state(self) -> dict[str, Any]:
        return dict(json.loads((self._folder / "index.json").read_text(encoding="utf-8")))

    def _log(self, event: str) -> None:
        with (self._folder / "searches.log").open("a", encoding="utf-8") as file:
            file.write(f"{event}\n")


def raise_fault(name: str | None) -> None:
    if name is not None:
        raise FAULTS[name]


def open_words(_settings: ServiceSettings) -> WordIndex:
    return WordIndex(Path.cwd())


app = main.create_app(open_search=open_words)
app.openapi()  # FastAPI keeps it, also for forks
