"""The OpenAPI document is exact: schemathesis makes right and wrong requests of it and checks every answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import main
from config import load_taxonomy
from config.service_settings import ServiceSettings, load_service_settings
from error_handler import ErrorKind
from service import errors as service_errors
from service.contract import EXAMPLE_REQUEST
from service.openapi import openapi_document
from service.similar import EXAMPLE_HITS, MAX_QUERY_CHARACTERS, SimilarResponse
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import WITH_PHRASES, ServiceProcess, serve
from tests.service.test_similar_service import APP, write_index

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
FIELDS = """
sentiments: [Positive, Negative]
fields:
  urgency: [High, Low]
  channels: {multiple: true, labels: [Phone, Chat]}
categorization: false
"""


def document(**settings: Any) -> dict[str, Any]:
    return openapi_document(main.app, load_service_settings(None, **settings), load_taxonomy())


def schemathesis(service: ServiceProcess, folder: Path, paths: str, *options: str) -> str:
    """Return what schemathesis says when it finds no fault in the answers of the routes that match *paths*."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{service.url}/openapi.json"]
    command += ["--include-path-regex", paths, "--checks", "all", "--seed", "1", "--generation-deterministic", *options]
    # Hypothesis keeps its table of characters there, which takes as long to make as all requests of a short run.
    environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(__file__).parents[2] / ".hypothesis")}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("phases", "taxonomy", "paths"),
    [
        pytest.param("coverage", None, "^/(classify|labels)$", id="classify"),
        pytest.param("examples,coverage,fuzzing", None, ".", id="all", marks=pytest.mark.thorough),
        pytest.param("examples,coverage,fuzzing", FIELDS, ".", id="fields", marks=pytest.mark.thorough),
    ],
)
def test_schemathesis_finds_no_deviation_from_the_document(
    tmp_path: Path, mongodb_uri: str, db_name: str, phases: str, taxonomy: str | None, paths: str
) -> None:
    """Statuses, headers, content types, bodies and methods: wrong requests are refused, right ones are answered."""
    # Answers are not kept, because a key that comes twice with two bodies is refused, and rightly.
    limits = {"API_MAX_MESSAGES": "20", "API_MAX_TEXT_CHARACTERS": "20000", "API_IDEMPOTENCY_RETENTION_S": "0"}
    limits |= {"API_MAX_OPEN_JOBS": "10000", "MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name}
    limits |= {"API_WEBHOOK_ORIGINS": "http://127.0.0.1:9", "API_WEBHOOK_SECRET": SECRET}
    if taxonomy is not None:
        limits["TAXONOMY_FILE"] = str(tmp_path / "own.yaml")
        (tmp_path / "own.yaml").write_text(taxonomy)
    write_index(tmp_path)
    with (
        FakeOllama(slots=8, user_message=0, record=False) as fake,
        serve(tmp_path, app=APP, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **limits) as service,
    ):
        said = schemathesis(service, tmp_path, paths, "--phases", phases, "--max-examples", "40")
        generated = re.search(r"(\d+) generated, (\d+) passed", said)
        assert generated is not None, said
        assert int(generated[1]) > 50
        assert "Traceback" not in service.log


def test_document_contains_the_configured_limits() -> None:
    """A client that reads them is never refused for a size."""
    schemas = document(max_messages=7, max_text_characters=99)["components"]["schemas"]
    assert schemas["ClassificationRequest"]["properties"]["messages"]["maxItems"] == 7
    assert schemas["Message"]["properties"]["text"]["maxLength"] == 99
    assert schemas["SimilarRequest"]["properties"]["text"]["maxLength"] == 99
    assert document()["paths"]["/similar"]["get"]["parameters"][0]["schema"]["maxLength"] == MAX_QUERY_CHARACTERS
    assert schemas["ClassificationRequest"]["additionalProperties"] is False


def test_document_requires_keys_if_keys_are_set() -> None:
    """Both ways to send one; none without."""
    keyed = document(keys="helpdesk:0123456789abcdef")
    assert keyed["paths"]["/classify"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    assert document()["paths"]["/classify"]["post"]["security"] == []
    assert "/metrics" not in document(expose_metrics="off")["paths"]
    assert "0123456789abcdef" not in json.dumps(keyed)


def test_example_of_a_search_answer_matches_the_schema() -> None:
    """The example of /similar in /docs has the fields of the real answers."""
    assert SimilarResponse.model_validate(EXAMPLE_HITS).model_dump() == EXAMPLE_HITS


KINDS = [kind for kind in vars(service_errors).values() if isinstance(kind, ErrorKind)]
# Not of a route in the document: what is no request, paths and methods that are not there, orders of the page.
ELSEWHERE = {
    *("WorkerEndedError", "QuarantineInUseError", "StateDirectoryError"),
    *("MalformedRequestError", "HeadTooLargeError", "NotFoundError", "MethodNotAllowedError"),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_every_error_is_documented(kind: ErrorKind) -> None:
    """With its status, and an example of its body."""
    page = (Path(__file__).parents[2] / "docs/service.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {kind.status} \| `{kind.name}` \|", page, re.MULTILINE)
    if kind.name not in ELSEWHERE:
        paths = document(expose_review="key")["paths"]
        operations = [paths["/classify"]["post"], paths["/similar"]["get"], paths["/similar"]["post"]]
        operations += [paths["/classify/batch"]["post"], paths["/jobs"]["post"], paths["/jobs/{job}"]["get"]]
        operations += [paths["/review/next"]["get"], paths["/review/decisions"]["post"]]
        answers = [operation["responses"].get(str(kind.status)) for operation in operations]
        examples = [answer["content"]["application/json"]["examples"] for answer in answers if answer]
        shown = [example[kind.name] for example in examples if kind.name in example]
        assert shown
        assert all(example["value"]["error"]["type"] == kind.name for example in shown)
    assert kind.message.endswith(".")


def test_documented_example_and_metrics_match_the_service(tmp_path: Path) -> None:
    """The example of /docs is answered when it is sent as it is; docs/service.md names the numbers that there are."""
    page = (Path(__file__).parents[2] / "docs/service.md").read_text(encoding="utf-8")
    with serve(tmp_path, app=WITH_PHRASES, API_EMBEDDED="true") as service:
        schemas = service.get("/openapi.json").json["components"]["schemas"]
        shown = schemas["ClassificationRequest"]["examples"][0]
        assert shown == EXAMPLE_REQUEST
        answer = service.classify(shown)
        assert answer.status == 200
        assert answer.json["messages"] == shown["messages"]
        numbers = set(re.findall(r"^# TYPE (triad_\w+)", service.get("/metrics").body.decode(), re.MULTILINE))
    named = {name.removesuffix("_bucket") for name in re.findall(r"triad_[a-z_]+", page)}
    assert {name for name in named if not name.startswith("triad_server_")} == numbers  # those are of several servers


def test_every_setting_is_documented() -> None:
    """docs/service.md has each variable."""
    page = (Path(__file__).parents[2] / "docs/service.md").read_text(encoding="utf-8")
    for field in ServiceSettings.model_fields.values():
        for name in getattr(field.validation_alias, "choices", []):
            assert f"`{name}`" in page
