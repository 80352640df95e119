"""How a run would make its results now, and what each document needs then."""

from __future__ import annotations

import async_llm_wrapper as llm
from aggregator import aggregate_conversation
from classifier import ReplyParser
from config import Settings, load_taxonomy
from error_handler import LLMUnavailableError
from mongo_client import DocumentStore
from prompt_builder import PromptBuilder
from utils.ollama_protocol import chat_target, plan_fingerprint
from utils.queued_documents import queued_keys
from utils.stored_results import StoredResults
from utils.work_kinds import WorkKinds


async def ask_plan(settings: Settings) -> str:
    """Return the plan_fingerprint of a run with *settings* now; the server is asked for its models alone.

    Raises:
        LLMUnavailableError: It does not answer.
        ConfigurationError: It does not have the model.
    """
    taxonomy = load_taxonomy(settings.taxonomy_file)
    async with llm.open_session(1) as session:
        client = llm.AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
        try:
            target = await client.prepare(settings)
        except LLMUnavailableError as exc:
            raise LLMUnavailableError(f"{exc}; what can be told without it: python cli.py plan --offline") from exc
    prompt, schema = PromptBuilder.from_taxonomy(taxonomy).system_prompt, ReplyParser(taxonomy).schema_json
    return plan_fingerprint(target, prompt, schema)


def work_kinds(store: DocumentStore, settings: Settings, plan: str | None) -> WorkKinds:
    """Return the judge of the documents of *store*; *plan* None where the model server was not asked."""
    made = StoredResults(store, settings).made
    return WorkKinds(aggregate_conversation, plan, made, lambda: queued_keys(settings.batch_files_dir))
