"""The example of docs/fields.md from end to end: worker, MongoDB, summary, doctor, service, OpenAPI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import api
from config import load_settings
from config.taxonomy import DEFAULT_TAXONOMY
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.service.service_process import CONVERSATION, serve
from tests.service.test_similar_service import APP, write_index
from tests.worker.engine_run import run_worker
from tests.worker.site import Site, conversation, filled, model_of

PAGE = (Path(__file__).parents[2] / "docs/fields.md").read_text(encoding="utf-8")
EXAMPLE, FORMS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
URGENCY = {"High", "Low", "Normal"}
COUNT = 12


@pytest.fixture
def labels(tmp_path: Path) -> str:
    """Return the path of the shipped taxonomy with the field of the example."""
    path = tmp_path / "labels.yaml"
    path.write_text(DEFAULT_TAXONOMY.read_text(encoding="utf-8") + EXAMPLE, encoding="utf-8")
    return str(path)


def classifications(site: Site) -> list[dict[str, Any]]:
    return [result["classification"] for result in site.results.find().sort("source_conversation_id")]


def test_worker_labels_the_field_of_the_example(site: Site, labels: str) -> None:
    """Each result has it, with confidence, an index and a share in the summary; earlier results are stale."""
    filled(site, COUNT)
    model_of(site).configure(logprobs={"*": 0.9})
    assert site.run().code == 0
    before = classifications(site)
    assert all(list(found) == ["intent", "topic", "sentiment", "categorization"] for found in before)

    output = site.folder / "run.json"
    ended = site.run("--only", "stale", "--output", str(output), TAXONOMY_FILE=labels)
    assert ended.code == 0, ended.err
    found = classifications(site)
    assert len(found) == COUNT
    assert all(list(one) == ["intent", "topic", "sentiment", "urgency", "categorization"] for one in found)
    assert {one["urgency"] for one in found} <= URGENCY
    assert len({one["urgency"] for one in found}) > 1
    stats = json.loads(output.read_text())
    assert sum(stats["labels"]["urgency"].values()) == COUNT
    assert re.search(r"^Urgency\s+(High|Low|Normal)\s+█", ended.out, re.MULTILINE)
    assert "classification.urgency_1" in site.results.index_information()
    confidence = site.results.find_one()["processing_metadata"]["confidence"]
    assert confidence == pytest.approx(dict.fromkeys(["intent", "topic", "sentiment", "urgency"], 0.9), abs=1e-3)


@pytest.mark.thorough
def test_service_answers_with_the_field_of_the_example(site: Site, labels: str, tmp_path: Path) -> None:
    """Its document lists the labels, and the answer has one of them."""
    variables = {"OLLAMA_ENDPOINT": model_of(site).url, "OLLAMA_MODEL": "llama3.2", "TAXONOMY_FILE": labels}
    write_index(tmp_path)
    with serve(tmp_path, app=APP, **variables) as service:
        schema = service.get("/openapi.json").json["components"]["schemas"]["Labels"]
        answer = service.classify(CONVERSATION)
        [hit] = service.get("/similar?text=parcel&limit=1").json["hits"]
    assert schema["properties"]["urgency"]["enum"] == ["High", "Low", "Normal"]
    assert answer.status == 200
    assert list(answer.json["classification"]) == schema["required"]
    assert answer.json["classification"]["urgency"] in URGENCY
    assert list(hit["classification"]) == schema["required"]
    assert (hit["classification"]["intent"], hit["classification"]["urgency"]) == ("Order Status", "")


@pytest.mark.thorough
def test_similar_conversations_have_lists_of_labels(tmp_path: Path) -> None:
    """Of the fields that the service knows; none where the conversation was labelled without them."""
    own = tmp_path / "own.yaml"
    own.write_text(f"{FORMS}categorization: false\n", encoding="utf-8")
    labelled = {"language": "English", "channels": ["Phone", "Chat"]}
    metadata = {"source_id": '"1"', "classified_by": "llama3.2", "intent": "Order Status", **labelled}
    write_index(tmp_path, items=[{"name": '"1"', "text": "parcel", "metadata": metadata}])
    with serve(tmp_path, app=APP, API_EMBEDDED="true", TAXONOMY_FILE=str(own)) as service:
        [hit] = service.get("/similar?text=parcel").json["hits"]
        answer = service.classify(CONVERSATION).json["classification"]
    assert hit["classification"] == {**labelled, "escalate": ""}
    assert hit["classified_by"] == "llama3.2"
    assert (answer["language"], answer["escalate"], len(answer["channels"])) == ("English", "No", 1)
    assert set(answer) == {"language", "escalate", "channels"}


def test_blocking_form_has_each_field_as_an_attribute(site: Site, labels: str) -> None:
    answer = api.classify_conversation(
        CONVERSATION,
        load_settings(None, ollama_endpoint=model_of(site).url, ollama_model="llama3.2", taxonomy_file=Path(labels)),
    )
    assert answer.classification.urgency in URGENCY
    assert answer.model_dump()["classification"]["urgency"] == answer.classification.urgency


def test_lists_of_labels_are_stored_and_copied_to_identical_conversations(site: Site, tmp_path: Path) -> None:
    """The other forms on the page; a file may have no other fields and no categorization."""
    own = tmp_path / "own.yaml"
    own.write_text(f"{FORMS}categorization: false\n", encoding="utf-8")
    site.source.insert_many([{**conversation(1), "_id": number} for number in range(3)])
    ended = site.run("--max-concurrent", "1", TAXONOMY_FILE=str(own))
    assert ended.code == 0, ended.err
    found = classifications(site)
    assert found == [found[0]] * 3
    assert list(found[0]) == ["language", "escalate", "channels"]
    assert found[0]["escalate"] in ("Yes", "No")
    [channel] = found[0]["channels"]
    assert channel in yaml.safe_load(FORMS)["fields"]["channels"]["labels"]
    assert sum("copied_from" in result["processing_metadata"] for result in site.results.find()) == 2
    assert "Channels" in ended.out
    assert "categorization" not in ended.out
    assert site.results.count_documents({"classification.channels": channel}) == 3


@pytest.mark.slow
def test_llama_cpp_accepts_the_schema_of_a_list(
    engine: TinyEngine, tmp_path: Path, mongodb_uri: str, db_name: str, site: Site
) -> None:
    """A real grammar: this random model would otherwise never write a label."""
    own = tmp_path / "own.yaml"
    own.write_text(f"{FORMS}categorization: false\n", encoding="utf-8")
    filled(site, 2)
    environment = {
        "LLM_API_URL": f"{engine.url}/v1/chat/completions", "LLM_MODEL": MODEL_NAME, "TAXONOMY_FILE": str(own)
    }  # fmt: skip
    stats = run_worker(tmp_path, mongodb_uri, db_name, environment, "--max-concurrent", "1")
    assert (stats["successful"], stats["failed"]) == (2, 0)
    allowed = yaml.safe_load(FORMS)["fields"]["channels"]["labels"]
    for found in classifications(site):
        assert found["channels"]
        assert len(set(found["channels"])) == len(found["channels"])
        assert set(found["channels"]) <= set(allowed)


def test_doctor_counts_the_labels_of_each_field(site: Site, labels: str) -> None:
    filled(site, 1)
    ended = site.run("doctor", TAXONOMY_FILE=labels)
    assert "The labels load: 14 intents, 14 topics, 3 sentiments, 3 labels of urgency." in ended.out
    assert "sentimental_analysis.classification.urgency" in ended.out
    assert re.search(r"got valid labels in .*, (High|Low|Normal)\.", ended.out)
