"""The actions of ``cli.py index``: index, estimate, rebuild, search."""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from config import Settings
from config.index_settings import IndexSettings, load_index_settings
from config.openai_settings import load_openai_settings
from database_docs.documentation_store import DocumentationStore
from database_docs.introspection import read_database
from database_docs.items import Ended, Offered
from database_docs.sample_database import make_sample_database
from domain.prices import price_source
from embedding_index import conversation_source, report
from embedding_index.batch_indexing import BatchIndexingManager, SQLIndexerAgent
from embedding_index.index_logs import log_to
from embedding_index.index_reader import IndexReader
from embedding_index.mending import Mending, StatesAfterMending, remove, sweep, update_metadata
from embedding_index.report import Spending, require_affordable
from embedding_index.vector_store import SQLVectorStore
from error_handler import (
    ConfigurationError,
    ExitCode,
    IndexingError,
    MixedIndexError,
    RunInterruptedError,
    StateDirectoryError,
)
from mongo_client import DocumentStore
from utils.process import end_soon, stop_on_signals

logger = logging.getLogger(__name__)

SAMPLE_DATABASE, SAMPLE_INDEX = Path("data/embedded/support.sqlite3"), Path("data/embedded/index")
HITS = 5
STOPPED = "Stopped; the same command resumes where this one stopped."


@dataclass(slots=True)
class Index:
    """The open parts of an action. While *works* is set, a signal waits for the calls in flight; otherwise it ends the process."""

    arguments: argparse.Namespace
    vectors: SQLVectorStore
    states: DocumentationStore
    manager: BatchIndexingManager
    mending: Mending
    spending: Spending
    stop: asyncio.Event
    works: asyncio.Event


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do one action; see ``Command``."""
    chosen = _index_settings(arguments)
    log_to(chosen, settings, verbose=arguments.verbose)
    stop, works = asyncio.Event(), asyncio.Event()

    def is_working() -> bool:
        if not works.is_set():
            end_soon()  # a thread may wait for an answer
        return works.is_set()

    with stop_on_signals(stop, is_working):
        if arguments.search is not None:
            return await asyncio.to_thread(_search, arguments, chosen)
        async with _opened(arguments, chosen, stop, works) as index:
            if arguments.source == "conversations":
                return await _conversations(settings, index)
            return await _database(index, chosen)


def _index_settings(arguments: argparse.Namespace) -> IndexSettings:
    chosen = load_index_settings(
        provider=arguments.provider, embedding_model=arguments.embedding_model, index_dir=arguments.index_dir
    )
    changes: dict[str, Any] = {"batch_size": 1} if arguments.individual else {}
    if arguments.sample:
        make_sample_database(SAMPLE_DATABASE)
        changes["database_url"] = SecretStr(f"sqlite:///{SAMPLE_DATABASE}")
        if arguments.index_dir is None:  # not INDEX_DIR: the sample must not mix with your own index
            changes["index_dir"] = SAMPLE_INDEX
    return chosen.model_copy(update=changes)


@asynccontextmanager
async def _opened(
    arguments: argparse.Namespace, chosen: IndexSettings, stop: asyncio.Event, works: asyncio.Event
) -> AsyncIterator[Index]:
    vectors = await asyncio.to_thread(_open_vectors, arguments, chosen)
    watch = asyncio.create_task(_hand_on(stop, vectors))
    try:
        with DocumentationStore(chosen.index_dir / "index.sqlite3") as states:
            manager = BatchIndexingManager(SQLIndexerAgent(vectors))
            mending = await asyncio.to_thread(
                Mending, vectors, states, rebuild=arguments.rebuild or vectors.is_other_model
            )
            spending = Spending(arguments.max_cost, arguments.yes)
            index = Index(arguments, vectors, states, manager, mending, spending, stop, works)
            try:
                works.set()
                if not arguments.estimate_costs and (mending.is_free or not spending.has_limit):
                    await asyncio.to_thread(mending.mend)
                yield index
            finally:
                vectors.stop.set()
                await asyncio.get_running_loop().shutdown_default_executor()  # no thread uses what is closed next
    finally:
        watch.cancel()
        with ThreadPoolExecutor(1) as thread:
            await asyncio.get_running_loop().run_in_executor(thread, vectors.close)


def _open_vectors(arguments: argparse.Namespace, chosen: IndexSettings) -> SQLVectorStore:
    try:
        return SQLVectorStore(chosen, rebuild=arguments.rebuild)
    except MixedIndexError as exc:
        if not arguments.estimate_costs:
            raise
        report.say(f"{exc} The estimate below is for --rebuild.")
        return SQLVectorStore(chosen, rebuild=True)  # nothing is replaced without ``Mending.mend``


async def _hand_on(stop: asyncio.Event, vectors: SQLVectorStore) -> None:
    await stop.wait()
    vectors.stop.set()


async def _database(index: Index, chosen: IndexSettings) -> int:
    if chosen.database_url is None:
        raise ConfigurationError(
            "DATABASE_URL is not set; set it to the database to document, try the sample with --sample, or index "
            "--source conversations."
        )
    facts = await asyncio.to_thread(read_database, chosen.database_url)
    done = await asyncio.to_thread(index.states.sync_database, facts.tables, facts.relationships)
    logger.info("the database has %d tables and %d relationships", len(facts.tables), len(facts.relationships))
    pending = index.mending.pending(done.removed)
    before = await asyncio.to_thread(index.manager.get_processing_stats, pending)
    tokens = await asyncio.to_thread(_tokens, index.manager, pending)
    if index.arguments.estimate_costs:
        return _show_estimate(index, before, tokens)
    await _require_affordable(index, before["total_estimated_cost"], tokens)
    outcome = _outcome(index, before)
    outcome.removed = await asyncio.to_thread(_renew, index, done)
    with report.IndexProgress("Indexing", before["total_pending"]) as progress, _measured(index, outcome):

        def note(ended: Ended) -> None:
            progress.failed(outcome.count(ended))
            progress.reached(outcome.indexed + outcome.failed)

        manager = BatchIndexingManager(index.manager.indexer, note)
        process = manager.batch_process_pending_tables
        outcome.results["tables"] = await asyncio.to_thread(process, index.states)
        process = manager.batch_process_pending_relationships
        outcome.results["relationships"] = await asyncio.to_thread(process, index.states)
    return _finish(index, outcome)


def _tokens(manager: BatchIndexingManager, pending: StatesAfterMending) -> int:
    texts = [text for texts in manager.pending_texts(pending) for text in texts]
    return int(manager.estimate_embedding_costs(manager.unpaid(texts))["estimated_tokens"])


@contextmanager
def _measured(index: Index, outcome: report.Outcome) -> Iterator[None]:
    """Measure the time of what is done inside. If it ends with an error, report first what was done until then."""
    started = time.monotonic()
    try:
        yield
    except (IndexingError, StateDirectoryError) as exc:
        outcome.error = str(exc)
        raise
    finally:
        outcome.duration_s = time.monotonic() - started
        if outcome.error is not None:
            _show(index, outcome)


async def _conversations(settings: Settings, index: Index) -> int:
    """Index classified conversations, or estimate what that costs."""
    documents = DocumentStore(settings)
    try:
        await documents.check()
        return await _index_conversations(settings, index, documents)
    finally:
        await documents.close()


async def _index_conversations(settings: Settings, index: Index, documents: DocumentStore) -> int:
    arguments, allowed = index.arguments, _is_allowed(index.arguments)

    def options(progress: report.IndexProgress) -> conversation_source.Options:
        return conversation_source.Options(
            settings,
            limit=arguments.limit,
            allow_external=allowed,
            on_read=lambda counts: progress.reached(counts.read, of=counts.expected),
        )

    conversation_source.require_allowed(index.vectors.provider, allowed=allowed)
    stats: dict[str, Any] = {}
    if arguments.estimate_costs or index.spending.has_limit:  # reads all conversations once more
        with report.IndexProgress("Reading conversations") as progress:
            made = await conversation_source.estimate_conversations(
                documents, index.mending.pending({}), index.vectors, options(progress), stop=index.stop
            )
        stats = _conversation_stats(index, made)
        if arguments.estimate_costs:
            return _show_estimate(index, stats, made.tokens)
        await _require_affordable(index, stats["total_estimated_cost"], made.tokens)
    outcome = _outcome(index, stats)
    with report.IndexProgress("Reading and indexing conversations") as progress, _measured(index, outcome):
        counts = await conversation_source.index_conversations(
            documents,
            index.states,
            index.manager.indexer,
            options(progress),
            stop=index.stop,
            on_ended=lambda ended: progress.failed(outcome.count(ended)),
        )
    if counts.is_complete:
        await asyncio.to_thread(_forget, index)
    outcome.removed = counts.removed
    outcome.more = {name: getattr(counts, name) for name in ("read", "unclassified", "without_text", "changed")}
    return _finish(index, outcome)


def _forget(index: Index) -> None:
    """Delete vectors that no item has any more, unless states were lost: a vector they do not know may be in use."""
    if sweep(index.vectors, index.states, report.KINDS["conversations"]):
        index.vectors.forget_others(index.states.hashes().values())


def _is_allowed(arguments: argparse.Namespace) -> bool:
    return arguments.allow_external or load_openai_settings().allow_external


def _conversation_stats(index: Index, made: conversation_source.ConversationEstimate) -> dict[str, Any]:
    return {
        "pending_conversations": made.pending,
        "total_estimated_cost": index.manager.price(made.tokens),
        "batch_size": index.manager.batch_size,
        "estimated_batches": -(-made.unpaid // index.manager.batch_size),
    }


def _show_estimate(index: Index, stats: dict[str, Any], tokens: int) -> int:
    if index.stop.is_set():
        raise RunInterruptedError("Stopped; nothing was sent.")
    identity = index.vectors.identity
    more = {
        "estimated_tokens": tokens,
        "provider": identity.provider,
        "model": identity.model,
        "prices_from": price_source(),
    }
    if not report.give_json({**stats, **more}, as_json=index.arguments.json, output=index.arguments.output):
        report.show_estimate(stats, tokens, str(identity), price_source())
    return ExitCode.DONE


async def _require_affordable(index: Index, usd: float | None, tokens: int) -> None:
    """Raise unless the price may be spent; then mend what waited for that."""
    if index.stop.is_set():
        raise RunInterruptedError("Stopped; nothing was sent.")
    price = f"{report.in_dollars(usd)} for about {tokens:,} tokens with {index.vectors.identity.model}"
    index.works.clear()
    await require_affordable(index.spending, usd, price)
    index.works.set()
    await asyncio.to_thread(index.mending.mend)


def _outcome(index: Index, before: dict[str, Any]) -> report.Outcome:
    identity = index.vectors.identity
    return report.Outcome(index.arguments.source, identity.provider, identity.model, identity.dimensions, before)


def _renew(index: Index, done: Offered) -> int:
    """Delete what the database no longer has from the entries, then from the states; return how many items that were."""
    for kind, names in done.removed.items():
        remove(index.vectors, index.states, kind, names)
    sweep(index.vectors, index.states, report.KINDS["database"])
    update_metadata(index.vectors, index.states, done.changed)
    return sum(map(len, done.removed.values()))


def _finish(index: Index, outcome: report.Outcome) -> int:
    outcome.is_interrupted = index.stop.is_set()
    _show(index, outcome)
    if outcome.is_interrupted:
        raise RunInterruptedError(STOPPED)
    return ExitCode.INCOMPLETE if outcome.failed else ExitCode.DONE


def _show(index: Index, outcome: report.Outcome) -> None:
    counts = index.vectors.counts
    outcome.dimensions = index.vectors.identity.dimensions
    outcome.calls, outcome.tokens, outcome.reused = counts.calls, counts.tokens, counts.reused
    outcome.cost_usd = index.manager.price(counts.tokens)
    spent = index.vectors.ledger.totals(index.vectors.identity)
    outcome.all_runs = report.Spent(spent.calls, spent.tokens, index.manager.price(spent.tokens))
    outcome.states = index.states.counts()
    logger.info(
        "%d items indexed, %d failed, %d removed in %.1f s: %d calls, %d tokens",
        *(outcome.indexed, outcome.failed, outcome.removed, outcome.duration_s, outcome.calls, outcome.tokens),
    )
    report.show_outcome(outcome, as_json=index.arguments.json, output=index.arguments.output)


def _search(arguments: argparse.Namespace, chosen: IndexSettings) -> int:
    with IndexReader(chosen) as index:
        if arguments.source == "conversations":  # the question is most often a text of a customer
            conversation_source.require_allowed(index.provider, allowed=_is_allowed(arguments))
        hits = index.search(arguments.search, report.KINDS[arguments.source], arguments.limit or HITS)
    report.show_hits(hits, arguments.source, as_json=arguments.json, output=arguments.output)
    return ExitCode.DONE
