"""From classified conversations in MongoDB to GET /similar: every part is the real one, the model runs in process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pymongo import MongoClient

from config import load_settings
from config.index_settings import IndexSettings, load_index_settings
from embedding_index.conversation_source import ConversationCounts, Options, index_conversations
from tests.embedding_index.stores import open_store
from tests.service.service_process import NO_MODEL, ServiceProcess, conversation, serve

pytestmark = pytest.mark.usefixtures("loaded_model")
KEY = "sk-not-a-real-key-0123456789"
PROBLEMS = {
    "late": "My parcel should have arrived on Monday and nobody can tell me where it is.",
    "twice": "You took the money from my credit card two times for one order.",
    "login": "I forgot my password and the link to set a new one never comes.",
    "crash": "The app closes itself as soon as I open the camera.",
}
QUERIES = {
    "late": "the package has still not been delivered",
    "twice": "I was charged twice",
    "login": "cannot sign in to my account",
    "crash": "your application crashes when taking a photo",
}


class Place:
    """A database of conversations, and the index made of them."""

    def __init__(self, uri: str, db_name: str, folder: Path) -> None:
        self.settings = load_settings(None, mongodb_uri=uri, db_name=db_name, mongodb_backoff_s=0)
        self.folder = folder
        self.client: MongoClient[dict[str, Any]] = MongoClient(uri)
        self.database = self.client[db_name]

    @property
    def index_settings(self) -> IndexSettings:
        return load_index_settings(None, provider="local", index_dir=self.folder / "index")

    @property
    def variables(self) -> dict[str, str]:
        return {"EMBEDDING_PROVIDER": "local", "INDEX_DIR": str(self.folder / "index"), **NO_MODEL}

    def add(self, name: str, text: str, intent: str = "Other") -> None:
        labels = {"intent": intent, "topic": "Other", "sentiment": "Negative", "categorization": f"About {name}."}
        self.database["conversation_set"].insert_one({"_id": name, **conversation(text, number=name)})
        made = {"processed_at": datetime(2026, 11, 21, 10, tzinfo=UTC), "model_used": "llama3.2"}
        self.database["sentimental_analysis"].insert_one(
            {"source_conversation_id": name, "classification": labels, "processing_metadata": made}
        )

    def index(self) -> ConversationCounts:
        return asyncio.run(self._index())

    async def _index(self) -> ConversationCounts:
        # Loaded here: they need the packages of requirements-index.txt.
        from database_docs.documentation_store import DocumentationStore
        from embedding_index.vector_store import SQLVectorStore

        uri = self.settings.mongodb_uri.get_secret_value()
        path = self.folder / "index" / "index.sqlite3"
        with SQLVectorStore(self.index_settings) as vectors, DocumentationStore(path) as states:
            async with open_store(uri, self.settings.db_name) as store:
                return await index_conversations(store, states, vectors, Options(self.settings))


@pytest.fixture
def place(mongodb_uri: str, db_name: str, tmp_path: Path) -> Iterator[Place]:
    made = Place(mongodb_uri, db_name, tmp_path)
    for name, text in PROBLEMS.items():
        made.add(name, text)
    yield made
    made.client.close()


def found(service: ServiceProcess, text: str) -> list[dict[str, Any]]:
    answer = service.get(f"/similar?text={quote(text)}")
    assert answer.status == 200, answer.body.decode() + service.log
    return list(answer.json["hits"])


@pytest.mark.slow
def test_past_conversations_are_found_by_meaning_and_forgotten_with_mongodb(place: Place, tmp_path: Path) -> None:
    """A running service finds new and relabelled conversations, and no deleted ones."""
    with serve(tmp_path, **place.variables) as service:
        assert service.get("/similar?text=parcel").error == "IndexEmptyError"
        counts = place.index()
        assert (counts.indexed, counts.failed, counts.removed) == (4, 0, 0)
        for name, query in QUERIES.items():
            best = found(service, query)[0]
            assert best["source_id"] == f'"{name}"'
            assert best["conversation_number"] == name
            assert best["classification"]["categorization"] == f"About {name}."
            assert best["classified_at"] == "2026-11-21T10:00:00+00:00"
            assert 0.3 < best["similarity"] <= 1
        assert found(service, PROBLEMS["late"])[0]["similarity"] > 0.999

        place.add("cancel", "Please cancel my subscription before it renews.", intent="Other")
        place.database["conversation_set"].delete_one({"_id": "late"})
        change = {"$set": {"classification.intent": "Complaint"}}
        place.database["sentimental_analysis"].update_one({"source_conversation_id": "twice"}, change)
        counts = place.index()
        assert (counts.indexed, counts.changed, counts.removed) == (1, 1, 1)
        assert found(service, "end my subscription")[0]["source_id"] == '"cancel"'
        assert found(service, QUERIES["twice"])[0]["classification"]["intent"] == "Complaint"
        assert '"late"' not in {hit["source_id"] for hit in found(service, PROBLEMS["late"])}
        assert service.get("/similar?text=parcel").headers["cache-control"] == "no-store"
        assert "parcel" not in service.log


def test_no_text_of_a_conversation_is_on_disk(place: Place, tmp_path: Path) -> None:
    """Only vectors, hashes and labels are stored."""
    place.index()
    content = b"".join(path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file())
    for text in PROBLEMS.values():
        assert text.encode() not in content
    assert b"About late." in content


@pytest.mark.thorough
def test_an_index_of_another_model_is_not_searched(place: Place, tmp_path: Path) -> None:
    """The log names both models and the remedy; the provider is not asked."""
    place.index()
    here = {"EMBEDDING_PROVIDER": "openai", "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    with serve(tmp_path, **{**place.variables, **here}) as service:
        answer = service.get("/similar?text=parcel")
        assert (answer.status, answer.error) == (503, "IndexUnusableError"), service.log
        assert "all-MiniLM-L6-v2" in service.log
        assert "text-embedding-3-small" in service.log
        assert "--rebuild" in service.log


@pytest.mark.thorough
def test_no_text_goes_to_openai_without_permission(place: Place, tmp_path: Path) -> None:
    """OpenAI's address is outside your network."""
    place.index()
    outside = {"EMBEDDING_PROVIDER": "openai", "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "", "ALLOW_EXTERNAL_LLM": ""}
    with serve(tmp_path, **{**place.variables, **outside}) as service:
        answer = service.get("/similar?text=parcel")
        assert (answer.status, answer.error) == (503, "ExternalProviderError"), service.log
        assert KEY not in service.log
