"""Every HTTP client of the product, each with one call that carries customer text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import SecretStr

import async_llm_wrapper
import llm_wrapper
from config import Settings, load_settings
from config.index_settings import load_index_settings
from embedding_index.providers.ollama_embeddings import OllamaProvider
from model_server.models import chat_target
from model_server.protocol import ServerRequest
from openai_batch.job_config import BatchConfig, OpenAIConfig
from openai_batch.notifications import Webhook
from openai_batch.openai_client import OpenAIFiles
from service.client.client import Pace, ServiceClient, open_session
from service.client.protocol import build_request, service_target
from tests.embedding_index.embedding_site import open_openai
from utils.retry_utils import RetryPolicy

TEXT = "Where is my parcel?"
Call = Callable[[str, Path], Any]


def _settings(url: str) -> Settings:
    return load_settings(None, ollama_endpoint=url, ollama_model="llama3.2")


def worker(url: str, _folder: Path) -> None:
    async def call() -> None:
        settings = _settings(url)
        async with async_llm_wrapper.open_session(1) as session:
            client = async_llm_wrapper.AsyncLLMClient(settings, chat_target(settings, "llama3.2"), session)
            await client._ask([{"role": "user", "content": TEXT}], b"{}", 0)

    asyncio.run(call())


def sync(url: str, _folder: Path) -> None:
    settings = _settings(url)
    with llm_wrapper.open_session() as session:
        client = llm_wrapper.LLMClient(settings, chat_target(settings, "llama3.2"), session)
        client._ask([{"role": "user", "content": TEXT}], b"{}", 0)


def bare_exchange(url: str, _folder: Path) -> None:
    with llm_wrapper.open_session() as session:
        llm_wrapper.exchange(session, ServerRequest("POST", f"{url}/api/embed", TEXT.encode(), 5), {})


def service(url: str, _folder: Path) -> None:
    async def call() -> None:
        async with open_session(1) as session:
            client = ServiceClient(service_target(url), session, Pace(1, asyncio.Event()), RetryPolicy(1, 0), 5)
            await client.classify(build_request("1", [{"sender": "customer", "text": TEXT}]))

    asyncio.run(call())


def jobs(url: str, folder: Path) -> None:
    async def call() -> None:
        config = OpenAIConfig(api_key=SecretStr("sk-test"), base_url=f"{url}/v1")
        (folder / "batch.jsonl").write_text(TEXT)
        async with OpenAIFiles(config, BatchConfig()) as files:
            await files.upload(folder / "batch.jsonl", "batch.jsonl")

    asyncio.run(call())


def openai_embeddings(url: str, _folder: Path) -> None:
    with closing(open_openai(f"{url}/v1")) as provider:
        provider.embed([TEXT])


def ollama_embeddings(url: str, _folder: Path) -> None:
    index = load_index_settings(None, provider="ollama", embedding_model="m")
    with closing(OllamaProvider(index, _settings(url))) as provider:
        provider.embed([TEXT])


def webhook(url: str, _folder: Path) -> None:
    asyncio.run(Webhook(SecretStr(f"{url}/hook"), None).send({"batch_id": "b", "status": "completed"}))


CLIENTS: dict[str, Call] = {
    call.__name__: call
    for call in (worker, sync, bare_exchange, service, jobs, openai_embeddings, ollama_embeddings, webhook)
}
