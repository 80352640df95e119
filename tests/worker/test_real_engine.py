"""The whole worker against an Ollama, if one is named. ``test_trained_model.py`` does the same with llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from config import load_taxonomy
from help_desks.reader import read_documents
from tests.worker.engine_run import SAMPLES, run_worker

OLLAMA = os.environ.get("OLLAMA_TEST_ENDPOINT")  # the report's header says whether it is set


def require_valid_labels(mongodb_uri: str, db_name: str, count: int) -> None:
    """Every result has labels of the taxonomy and says what made it."""
    taxonomy = load_taxonomy()
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        results = list(client[db_name].sentimental_analysis.find())
    assert len(results) == count
    for result in results:
        for field in ("intent", "topic", "sentiment"):
            assert result["classification"][field] in taxonomy.names(field)
        assert result["classification"]["categorization"].strip()
        assert result["processing_metadata"]["prompt_tokens"] > 500


if OLLAMA:

    def test_a_running_ollama_labels_the_samples(tmp_path: Path, mongodb_uri: str, db_name: str) -> None:
        """Against the Ollama named by OLLAMA_TEST_ENDPOINT, with OLLAMA_TEST_MODEL (llama3.2)."""
        documents = list(read_documents(SAMPLES))[:5]
        with MongoClient[dict[str, Any]](mongodb_uri) as client:
            client[db_name].conversation_set.insert_many(documents)
        environment = {
            "OLLAMA_ENDPOINT": OLLAMA,
            "OLLAMA_MODEL": os.environ.get("OLLAMA_TEST_MODEL", "llama3.2"),
        }
        stats = run_worker(tmp_path, mongodb_uri, db_name, environment, "--max-concurrent", "1")
        assert stats["successful"] == 5
        require_valid_labels(mongodb_uri, db_name, 5)
