"""The last sentence of a run whose model server cannot be used, and its exit code."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tests.fakes.scripted_server import ScriptedServer, Step, answer, scripted_server
from tests.worker.site import Site, conversation

PAGE = answer(b"<html><title>Blocked by Proxy</title></html>", 403, Content_Type="text/html")
DENIED = answer({"error": {"message": "Invalid API Key"}}, 401)


def last_words(site: Site, **settings: str) -> str:
    """Run once with *settings*; return the end of the error output."""
    if not site.source.count_documents({}):
        site.source.insert_one(conversation(1))
    ended = site.run(**settings)
    assert ended.code == 3, ended.err
    assert site.source.find_one({})["status"] == "pending", "nothing is the fault of the document"
    return ended.err.strip().replace("\n", " ")


def test_nobody_listens(site: Site, server: ScriptedServer) -> None:
    server.stop()
    assert "start it (ollama serve) or correct OLLAMA_ENDPOINT" in last_words(site, OLLAMA_ENDPOINT=server.url)
    url = f"{server.url}/v1/chat/completions"
    assert "start it or correct LLM_API_URL" in last_words(site, LLM_API_URL=url, LLM_MODEL="m")


def test_name_that_does_not_exist(site: Site) -> None:
    words = last_words(site, OLLAMA_ENDPOINT="http://gpu.example.invalid:11434")
    assert "gpu.example.invalid:11434 cannot be resolved (DNS); correct OLLAMA_ENDPOINT" in words
    assert "start it" not in words


def test_certificate_that_is_not_trusted(site: Site, certificate: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with scripted_server(tls=context) as server:
        words = last_words(site, OLLAMA_ENDPOINT=server.url.replace("http", "https"))
    assert "is not trusted (self-signed certificate); set SSL_CERT_FILE (or REQUESTS_CA_BUNDLE)" in words
    assert "start it" not in words


@pytest.mark.parametrize(
    ("step", "key", "words"),
    [
        (PAGE, "", "the server says: a web page, Blocked by Proxy"),
        (DENIED, "", "(HTTP 401); check LLM_API_KEY; the server says: Invalid API Key"),
        (DENIED, "a-wrong-key", "(HTTP 401); check LLM_API_KEY; the server says: Invalid API Key"),
    ],
    ids=["page of a proxy", "no key", "wrong key"],
)
def test_list_of_models_is_refused(site: Site, server: ScriptedServer, step: Step, key: str, words: str) -> None:
    server.models = step
    given = {
        "LLM_API_URL": f"{server.url}/v1/chat/completions",
        "LLM_MODEL": "m",
        **({"LLM_API_KEY": key} if key else {}),
    }
    said = last_words(site, **given)
    assert words in said
    assert "start it" not in said
    assert "a-wrong-key" not in said
