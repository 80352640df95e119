"""A client of SmolLM2 on llama.cpp, and the taxonomy that it labels with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.worker_process import WorkerFailedError
from config import Taxonomy, load_settings, load_taxonomy
from llm_wrapper import LLMClient, open_session
from model_server.models import chat_target
from tests.fakes.trained_model import MISSING, NAME, model_path, trained_engine


@contextmanager
def trained_client(taxonomy_text: str, *, context_tokens: int, slots: int = 1) -> Iterator[tuple[LLMClient, Taxonomy]]:
    """Start the engine with *slots* windows of *context_tokens*, and yield its client and the taxonomy in *taxonomy_text*.

    Raises:
        WorkerFailedError: The model is not installed.
    """
    model = model_path()
    if model is None:
        raise WorkerFailedError(MISSING)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        own = Path(folder) / "taxonomy.yaml"
        own.write_text(taxonomy_text, encoding="utf-8")
        taxonomy = load_taxonomy(own)
    with trained_engine(model, context_tokens=context_tokens, slots=slots) as engine, open_session() as session:
        address = f"{engine.url}/v1/chat/completions"
        settings = load_settings(None, llm_api_url=address, llm_model=NAME, llm_timeout_s=300)
        yield LLMClient(settings, chat_target(settings, NAME), session), taxonomy
