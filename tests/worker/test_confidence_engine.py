"""Confidence with an engine that really infers: llama.cpp, and what it says itself of each allowed label."""

from __future__ import annotations

import itertools
import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from aggregator import aggregate_conversation
from classifier import Classifier
from config import load_taxonomy
from domain.confidence import label_confidence
from domain.conversation import Classification
from domain.document_files import read_documents
from model_server.protocol import TOP_LOGPROBS
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.worker.engine_run import SAMPLES, run_worker

TAXONOMY = load_taxonomy()
CLASSIFIER = Classifier(TAXONOMY)
FIELDS = TAXONOMY.field_names
LABELS = {field: TAXONOMY.names(field) for field in FIELDS}
WHOLE_VOCABULARY = 2000  # more than the tiny model has tokens
NUMBERS = [0, *(pytest.param(number, marks=pytest.mark.thorough) for number in (1, 2, 3))]  # of the samples


def post(engine: TinyEngine, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        engine.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


class Asked:
    """One conversation, what the engine answered, and what it says of every other way to go on."""

    def __init__(self, engine: TinyEngine, number: int) -> None:
        self._engine = engine
        document = next(itertools.islice(read_documents(SAMPLES), number, None))
        messages = CLASSIFIER.messages(aggregate_conversation(document).transcript)
        schema = {"name": "triad", "strict": True, "schema": json.loads(CLASSIFIER.schema_json)}
        self._body = {
            "model": MODEL_NAME,
            "messages": messages,
            "temperature": 0,
            "logprobs": True,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        prompt = post(engine, "/apply-template", {"messages": messages})["prompt"]
        self._prompt: list[int] = post(engine, "/tokenize", {"content": prompt, "parse_special": True})["tokens"]

    def answer(self, top: int = TOP_LOGPROBS) -> tuple[list[dict[str, Any]], str, Classification]:
        """Return token entries, text and labels of the answer, with *top* alternatives per token."""
        [choice] = post(self._engine, "/v1/chat/completions", {**self._body, "top_logprobs": top})["choices"]
        text = choice["message"]["content"]
        return choice["logprobs"]["content"], text, CLASSIFIER.parse(text)

    def true_probability(self, field: str, entries: list[dict[str, Any]], label: str) -> float:
        """Return the probability of *label* when each next token is drawn by the model's own, among those allowed.

        Nothing of the product: every way to cut every label into tokens is followed as far as it is undecided.
        """
        joined = b""
        before: list[int] = []
        for entry in entries:
            if joined.replace(b" ", b"").endswith(f'"{field}":"'.encode()):
                break
            joined += bytes(entry["bytes"])
            before.append(entry["id"])
        return self._walk(before, {name: f'{name}"'.encode() for name in LABELS[field]}, label)

    def _walk(self, before: list[int], left: dict[str, bytes], label: str) -> float:
        if label not in left:
            return 0.0
        if len(left) == 1:
            return 1.0
        branches = []
        for token in self._next(before):
            content = bytes(token["bytes"])
            ways = {
                name: rest[len(content) :]
                for name, rest in left.items()
                if content and (rest.startswith(content) or content == rest + b",")
            }
            if ways:
                branches.append((math.exp(token["logprob"]), token["id"], ways))
        total = sum(weight for weight, _, _ in branches)
        return sum(weight / total * self._walk([*before, number], ways, label) for weight, number, ways in branches)

    def _next(self, before: list[int]) -> list[dict[str, Any]]:
        body = {"prompt": self._prompt + before, "n_predict": 1, "n_probs": WHOLE_VOCABULARY, "temperature": 0}
        [place] = post(self._engine, "/completion", {**body, "cache_prompt": True})["completion_probabilities"]
        return place["top_logprobs"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.thorough
def test_confidence_with_all_alternatives_equals_the_engines_probability(engine: TinyEngine, number: int) -> None:
    """Exactly, where no token that leaves the label open is likely; near it elsewhere."""
    asked = Asked(engine, number)
    entries, text, classification = asked.answer(WHOLE_VOCABULARY)
    found = label_confidence(entries, text, classification, LABELS)
    assert found is not None
    truth = {name: asked.true_probability(name, entries, getattr(classification, name)) for name in FIELDS}
    assert found["intent"] == pytest.approx(truth["intent"], abs=1e-3)
    for field in FIELDS:
        assert found[field] == pytest.approx(truth[field], abs=0.2), field


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.thorough
def test_confidence_with_20_alternatives_is_no_higher_than_the_engines(engine: TinyEngine, number: int) -> None:
    """Unlisted tokens count against a label: this model's random words crowd the labels out of the 20."""
    asked = Asked(engine, number)
    entries, text, classification = asked.answer()
    found = label_confidence(entries, text, classification, LABELS)
    assert found is not None
    for field in FIELDS:
        truth = asked.true_probability(field, entries, getattr(classification, field))
        assert 0 < found[field] <= truth + 1e-3, field


@pytest.mark.thorough
def test_probabilities_of_all_labels_sum_to_one(engine: TinyEngine) -> None:
    """The judge of the tests above is sound."""
    asked = Asked(engine, 0)
    entries, _, _ = asked.answer()
    for field in ("intent", "sentiment"):
        assert sum(asked.true_probability(field, entries, label) for label in LABELS[field]) == pytest.approx(1)


@pytest.mark.thorough
def test_worker_stores_confidence(tmp_path: Path, mongodb_uri: str, db_name: str, engine: TinyEngine) -> None:
    """Over the OpenAI protocol: each result has it, no two conversations need have the same, and the least decides."""
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[db_name].conversation_set.insert_many(list(itertools.islice(read_documents(SAMPLES), 4)))
        environment = {"LLM_API_URL": f"{engine.url}/v1/chat/completions", "LLM_MODEL": MODEL_NAME}
        stats = run_worker(
            tmp_path, mongodb_uri, db_name, environment, "--max-concurrent", "2", "--review-below", "0.072"
        )
        found = [result["processing_metadata"] for result in client[db_name].sentimental_analysis.find()]
    assert len(found) == stats["successful"] == stats["with_confidence"] == 4
    for metadata in found:
        assert metadata["confidence"].keys() == set(FIELDS)
        assert all(0 < value <= 1 for value in metadata["confidence"].values())
        assert metadata["needs_review"] is (min(metadata["confidence"].values()) < 0.072)
    assert len({tuple(metadata["confidence"].values()) for metadata in found}) > 1
    assert 0 < stats["needs_review"] == sum(metadata["needs_review"] for metadata in found) < 4
