"""The actions of ``cli.py index``: index, estimate, make anew, search."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from config import Settings
from config.index_settings import IndexSettings, load_index_settings
from config.openai_settings import load_openai_settings
from embedding_index import conversation_source, report
from embedding_index.batch_indexing import BatchIndexingManager
from embedding_index.documentation_store import DocumentationStore
from embedding_index.forgetting import forget_others
from embedding_index.index_reader import IndexReader
from embedding_index.indexer_agent import SQLIndexerAgent
from embedding_index.introspection import read_database
from embedding_index.item_states import Synchronized
from embedding_index.items import Kind
from embedding_index.mending import mend
from embedding_index.sample_database import make_sample_database
from embedding_index.vector_recovery import recover_vectors
from embedding_index.vector_store import SQLVectorStore
from error_handler import ConfigurationError, EmbeddingCostError, ExitCode, RunInterruptedError
from logger import configure_logging
from mongo_client import DocumentStore
from utils.atomic_file import replace_file
from utils.batch_prices import price_source
from utils.stop_signals import stop_on_signals

logger = logging.getLogger(__name__)

SAMPLE_DATABASE, SAMPLE_INDEX = Path("data/embedded/support.sqlite3"), Path("data/embedded/index")
HITS = 5
KINDS = {"database": (Kind.TABLE, Kind.RELATIONSHIP), "conversations": (Kind.CONVERSATION,)}


@dataclass(slots=True)
class Index:
    """What the actions work with; *documents* is MongoDB."""

    vectors: SQLVectorStore
    states: DocumentationStore
    manager: BatchIndexingManager
    documents: DocumentStore
    stop: asyncio.Event


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do one action; see ``Command``."""
    chosen = _index_settings(arguments)
    if chosen.log_file is not None:
        configure_logging(settings.log_level, file=chosen.log_file, secrets=_secrets(chosen))
    if arguments.search is not None:
        return await asyncio.to_thread(_search, arguments, chosen)
    stop, connected = asyncio.Event(), asyncio.Event()
    with stop_on_signals(stop, connected.is_set):
        async with _opened(arguments, settings, chosen, stop) as index:
            await asyncio.to_thread(_mend, index)
            connected.set()
            if arguments.source == "conversations":
                return await _conversations(arguments, settings, index)
            return await _database(arguments, index, chosen)


def _index_settings(arguments: argparse.Namespace) -> IndexSettings:
    chosen = load_index_settings(
        provider=arguments.provider, embedding_model=arguments.embedding_model, index_dir=arguments.index_dir
    )
    if not arguments.sample:
        return chosen
    make_sample_database(SAMPLE_DATABASE)
    changes: dict[str, Any] = {"database_url": SecretStr(f"sqlite:///{SAMPLE_DATABASE}")}
    if "index_dir" not in chosen.model_fields_set:  # what is tried out does not mix with what is in use
        changes["index_dir"] = SAMPLE_INDEX
    return chosen.model_copy(update=changes)


def _secrets(chosen: IndexSettings) -> list[str]:
    given = (chosen.database_url, load_openai_settings().api_key)
    return [secret.get_secret_value() for secret in given if secret is not None]


@asynccontextmanager
async def _opened(
    arguments: argparse.Namespace, settings: Settings, chosen: IndexSettings, stop: asyncio.Event
) -> AsyncIterator[Index]:
    vectors = await asyncio.to_thread(SQLVectorStore, chosen, rebuild=arguments.rebuild)
    watch = asyncio.create_task(_hand_on(stop, vectors))
    documents = DocumentStore(settings)
    try:
        if arguments.individual:
            vectors.batch_size = 1
        with DocumentationStore(chosen.index_dir / "index.sqlite3") as states:
            manager = BatchIndexingManager(SQLIndexerAgent(vectors))
            yield Index(vectors, states, manager, documents, stop)
    finally:
        watch.cancel()
        await documents.close()
        await asyncio.to_thread(vectors.close)


async def _hand_on(stop: asyncio.Event, vectors: SQLVectorStore) -> None:
    await stop.wait()
    vectors.stop.set()


def _mend(index: Index) -> None:
    recover_vectors(index.vectors, index.states)
    with report.IndexProgress("Making the index anew") as progress:
        mend(index.vectors, index.states, progress.reached)


async def _database(arguments: argparse.Namespace, index: Index, chosen: IndexSettings) -> int:
    if chosen.database_url is None:
        raise ConfigurationError(
            "DATABASE_URL is not set; set it to the database to document, or try --sample for a small one."
        )
    facts = await asyncio.to_thread(read_database, chosen.database_url)
    done = await asyncio.to_thread(index.states.sync_database, facts.tables, facts.relationships)
    before = index.manager.get_processing_stats(index.states)
    unpaid = [text for texts in index.manager.pending_texts(index.states) for text in texts]
    tokens = index.manager.estimate_embedding_costs(index.manager.unpaid(unpaid))["estimated_tokens"]
    if arguments.estimate_costs:
        return _show_estimate(arguments, index, before, tokens)
    await asyncio.to_thread(_require_affordable, arguments, index, before["total_estimated_cost"], tokens)
    outcome = _outcome(arguments, index, before)
    outcome.removed = await asyncio.to_thread(_renew, index, done)
    with report.IndexProgress("Indexing", before["total_pending"]) as progress:

        def note(kind: Kind, ended: Sequence[tuple[str, str | None]]) -> None:
            for name, problem in ended:
                outcome.count(kind, name, problem)
            progress.ended(ended)

        index.manager.on_items = note
        await asyncio.to_thread(_index_pending, index, outcome)
    return _finish(arguments, index, outcome)


def _index_pending(index: Index, outcome: report.Outcome) -> None:
    started = time.monotonic()
    try:
        outcome.results["tables"] = index.manager.batch_process_pending_tables(index.states)
        outcome.results["relationships"] = index.manager.batch_process_pending_relationships(index.states)
    finally:
        outcome.duration_s = time.monotonic() - started


async def _conversations(arguments: argparse.Namespace, settings: Settings, index: Index) -> int:
    """Index conversations that have a classification, or say what that would cost."""
    allowed = arguments.allow_external or load_openai_settings().allow_external
    await index.documents.check()
    with report.IndexProgress("Reading conversations") as progress:
        options = conversation_source.Options(
            settings,
            limit=arguments.limit,
            allow_external=allowed,
            on_read=lambda counts: progress.reached(counts.read, of=counts.expected),
        )
        stats: dict[str, Any] = {}
        if arguments.estimate_costs or arguments.max_cost is not None:  # a whole reading of its own
            made = await conversation_source.estimate_conversations(
                index.documents, index.states, index.vectors, options, stop=index.stop
            )
            stats = _conversation_stats(index, made)
            if arguments.estimate_costs:
                return _show_estimate(arguments, index, stats, made.tokens)
            await asyncio.to_thread(_require_affordable, arguments, index, stats["total_estimated_cost"], made.tokens)
        outcome = _outcome(arguments, index, stats)
        started = time.monotonic()
        counts = await conversation_source.index_conversations(
            index.documents,
            index.states,
            index.manager.indexer,
            options,
            stop=index.stop,
            on_result=lambda name, problem: outcome.count(Kind.CONVERSATION, name, problem),
        )
    if counts.is_complete:
        await asyncio.to_thread(forget_others, index.vectors, index.states)
    outcome.duration_s = time.monotonic() - started
    outcome.removed = counts.removed
    outcome.more = {name: getattr(counts, name) for name in ("read", "unclassified", "without_text", "changed")}
    return _finish(arguments, index, outcome)


def _conversation_stats(index: Index, made: conversation_source.ConversationEstimate) -> dict[str, Any]:
    return {
        "pending_conversations": made.pending,
        "total_estimated_cost": index.manager.price(made.tokens),
        "batch_size": index.manager.batch_size,
        "estimated_batches": math.ceil(made.unpaid / index.manager.batch_size),
    }


def _show_estimate(arguments: argparse.Namespace, index: Index, stats: dict[str, Any], tokens: int) -> int:
    identity = index.vectors.identity
    if arguments.json or arguments.output:
        text = json.dumps(
            {**stats, "estimated_tokens": tokens, "model": identity.model, "prices_from": price_source()}, indent=2
        )
        if arguments.output:
            replace_file(arguments.output, text.encode())
        if arguments.json:
            sys.stdout.write(text + "\n")
            return ExitCode.DONE
    report.show_estimate(stats, tokens, str(identity), price_source())
    return ExitCode.DONE


def _require_affordable(arguments: argparse.Namespace, index: Index, usd: float | None, tokens: int) -> None:
    """Ask, or refuse where nobody can be asked, before more than ``--max-cost`` is spent."""
    if arguments.max_cost is None or arguments.yes or (usd is not None and usd <= arguments.max_cost):
        return
    price = f"{report.in_dollars(usd)} for about {tokens:,} tokens with {index.vectors.identity.model}"
    if sys.stdin.isatty() and sys.stderr.isatty():
        sys.stderr.write(f"This costs {price}, more than --max-cost {arguments.max_cost}. Go on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise EmbeddingCostError(f"Nothing was sent: {price}; raise --max-cost, or give --yes to spend it.")


def _outcome(arguments: argparse.Namespace, index: Index, before: dict[str, Any]) -> report.Outcome:
    identity = index.vectors.identity
    return report.Outcome(arguments.source, identity.provider, identity.model, identity.dimensions, before)


def _renew(index: Index, done: Synchronized) -> int:
    """Take what the database no longer has out of the index, then out of the states; return how many that were."""
    for kind, names in done.removed.items():
        index.vectors.delete(kind, names)
        index.states.remove(kind, names)
    if done.changed:
        index.vectors.update_metadata(done.changed)
        for kind in {item.kind for item in done.changed}:
            same = [(item.name, item.content_hash) for item in done.changed if item.kind is kind]
            index.states.mark_indexed_many(kind, same)
    return sum(map(len, done.removed.values()))


def _finish(arguments: argparse.Namespace, index: Index, outcome: report.Outcome) -> int:
    counts = index.vectors.counts
    outcome.dimensions = index.vectors.identity.dimensions
    outcome.calls, outcome.tokens, outcome.reused = counts.calls, counts.tokens, counts.reused
    outcome.cost_usd = index.manager.price(counts.tokens)
    outcome.is_interrupted = index.stop.is_set()
    report.show_outcome(outcome, as_json=arguments.json, output=arguments.output)
    if outcome.is_interrupted:
        raise RunInterruptedError("Stopped; the same command goes on where this one ended.")
    return ExitCode.INCOMPLETE if outcome.failed else ExitCode.DONE


def _search(arguments: argparse.Namespace, chosen: IndexSettings) -> int:
    with IndexReader(chosen) as index:
        hits = index.search(arguments.search, KINDS[arguments.source], arguments.limit or HITS)
    report.show_hits(hits, as_json=arguments.json)
    return ExitCode.DONE
