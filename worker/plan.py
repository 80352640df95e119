"""How a run would make its results now, and what each document needs then."""

from __future__ import annotations

import logging
from pathlib import Path

import async_llm_wrapper as llm
from aggregator import aggregate_conversation
from classifier import ReplyParser
from config import Settings, load_taxonomy
from domain.staleness import StalenessChecker
from error_handler import LLMUnavailableError
from model_server.protocol import chat_target, plan_fingerprint
from mongo_client import DocumentStore
from prompt_builder import PromptBuilder
from storage import extended_json
from worker.stored_results import StoredResults


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


def work_kinds(store: DocumentStore, settings: Settings, plan: str | None) -> StalenessChecker:
    """Return the judge of the documents of *store*; *plan* None where the model server was not asked."""
    made = StoredResults(store, settings).made
    return StalenessChecker(aggregate_conversation, plan, made, lambda: queued_keys(settings.batch_files_dir))


logger = logging.getLogger(__name__)


def queued_keys(directory: Path) -> set[bytes]:
    """Return the ``id_key`` of each document in the retry queue or in quarantine under *directory*.

    A file that cannot be read is passed over with a warning; in MongoDB its documents say failed as well.
    """
    keys: set[bytes] = set()
    for path in sorted(path for kind in ("retry", "quarantine") for path in (directory / kind).glob("batch_*.json")):
        try:
            entries = extended_json.loads(path.read_bytes())
            keys |= {extended_json.id_key(entry["conversation_id"]) for entry in entries}
        except FileNotFoundError:
            continue  # worked off in this moment
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("%s cannot be read; its documents count by their status alone", path)
    return keys
