"""SmolLM2 on llama.cpp for the benchmarks of the model's time, and a client that keeps what the engine reports of each call."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

from benchmarks.worker_process import WorkerFailedError
from config import Settings, load_settings
from llm_wrapper import LLMClient, open_session
from model_server.models import chat_target
from model_server.protocol import ChatTarget, ServerRequest
from tests.fakes.tiny_engine import TinyEngine
from tests.fakes.trained_model import MISSING, model_path, write_as_q8_0

NAME = "smollm2:135m-instruct-q8_0"
CONTEXT_TOKENS = 3072  # the shipped prompt, a conversation, and the longest answer


@dataclass(frozen=True)
class EngineCall:
    """The report of llama.cpp on one call: tokens of the prompt and of the answer, and the milliseconds that each took."""

    cached_tokens: int
    evaluated_tokens: int
    reply_tokens: int
    prompt_ms: float
    reply_ms: float


class RecordingClient(LLMClient):
    """A synchronous client that appends each answered call to *calls*."""

    def __init__(self, settings: Settings, target: ChatTarget, session: requests.Session) -> None:
        super().__init__(settings, target, session)
        self.calls: list[EngineCall] = []

    def send(self, request: ServerRequest) -> tuple[int, bytes]:
        """Send *request* and keep the timings of its answer."""
        status, body = super().send(request)
        timings = json.loads(body).get("timings") if status == 200 else None
        if timings:
            counts = (timings[name] for name in ("cache_n", "prompt_n", "predicted_n", "prompt_ms", "predicted_ms"))
            self.calls.append(EngineCall(*counts))
        return status, body


@contextlib.contextmanager
def open_model() -> Iterator[Path]:
    """Yield the file of the model as Q8_0, a type that llama.cpp reads prompts fast with on processors.

    Raises:
        WorkerFailedError: The model is not installed.
    """
    if (source := model_path()) is None:
        raise WorkerFailedError(MISSING)
    with tempfile.TemporaryDirectory() as directory:
        yield write_as_q8_0(source, Path(directory, "model.gguf"))


@contextlib.contextmanager
def open_client(model: Path, slots: int) -> Iterator[RecordingClient]:
    """Yield a client of a new engine with all processors and *slots*, each of which keeps one prompt in its prefix cache."""
    engine_of_model = TinyEngine(model, slots, CONTEXT_TOKENS, name=NAME, threads=os.cpu_count() or 1)
    with engine_of_model as engine, open_session() as session:
        settings = load_settings(
            None, llm_api_url=f"{engine.url}/v1/chat/completions", llm_model=NAME, llm_timeout_s=1200
        )
        client = RecordingClient(settings, chat_target(settings, NAME), session)
        client.prepare(
            settings
        )  # as a run does: it recognises llama.cpp, which then gets a grammar without white space
        yield client
