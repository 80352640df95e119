"""The actions of ``cli.py index``: index, estimate, rebuild, search."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import SecretStr

from config import Settings
from config.index_settings import IndexSettings, load_index_settings
from config.openai_settings import load_openai_settings
from database_docs.documentation_store import DocumentationStore
from database_docs.introspection import read_database
from database_docs.items import Ended, Kind, Offered
from database_docs.sample_database import make_sample_database
from domain.prices import price_source
from embedding_index import conversation_source, report
from embedding_index.batch_indexing import (
    BatchIndexingManager,
    Mending,
    SQLIndexerAgent,
    remove,
    sweep,
    update_metadata,
)
from embedding_index.vector_search import IndexReader
from embedding_index.vector_store import SQLVectorStore
from error_handler import (
    ConfigurationError,
    ExitCode,
    IndexingError,
    MixedIndexError,
    RunInterruptedError,
    StateDirectoryError,
)
from logger import configure_logging
from mongo_client import DocumentStore
from utils.process import end_soon, stop_on_signals

logger = logging.getLogger(__name__)

SAMPLE_DATABASE, SAMPLE_INDEX = Path("data/embedded/support.sqlite3"), Path("data/embedded/index")
HITS = 5
SHORTEST_SECRET = 4  # characters; masking shorter ones would also mask parts of words


@dataclass(slots=True)
class Index:
    """The open parts of an action. While *works* is set, a signal waits for the calls in flight; otherwise it ends the process."""

    arguments: argparse.Namespace
    vectors: SQLVectorStore
    states: DocumentationStore
    manager: BatchIndexingManager
    mending: Mending
    works: threading.Event


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do one action; see ``Command``."""
    chosen = _index_settings(arguments)
    log_to(chosen, settings, verbose=arguments.verbose)
    stop, works = threading.Event(), threading.Event()

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


def log_to(chosen: IndexSettings, settings: Settings, *, verbose: bool) -> None:
    """Log lines of LOG_LEVEL to LOG_FILE, and warnings to stderr; with *verbose*, all lines to stderr as well. Mask secrets.

    Raises:
        ConfigurationError: LOG_FILE cannot be written.
    """
    level = settings.log_level if verbose or chosen.log_file is not None else "WARNING"
    try:
        configure_logging(
            level,
            file=chosen.log_file,
            secrets=_secrets(chosen, settings),
            stderr_level=None if verbose else "WARNING",
        )
    except OSError as exc:
        raise ConfigurationError(
            f"LOG_FILE {chosen.log_file} cannot be written ({exc.strerror}); name another."
        ) from exc


def _secrets(chosen: IndexSettings, settings: Settings) -> list[str]:
    given = [chosen.database_url, load_openai_settings().api_key, settings.llm_api_key]
    secrets = [secret.get_secret_value() for secret in given if secret is not None]
    if chosen.database_url is not None:
        address = chosen.database_url.get_secret_value().partition("://")[2]
        user, found, _ = address.rpartition("@")
        password = user.partition(":")[2] if found else ""
        secrets += [password, unquote(password)]
    return [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]


@asynccontextmanager
async def _opened(
    arguments: argparse.Namespace, chosen: IndexSettings, stop: threading.Event, works: threading.Event
) -> AsyncIterator[Index]:
    vectors = await asyncio.to_thread(_open_vectors, arguments, chosen, stop)
    try:
        with DocumentationStore(chosen.index_dir / "index.sqlite3") as states:
            try:
                is_rebuild = arguments.rebuild or vectors.is_other_model
                mending = await asyncio.to_thread(Mending, vectors, states, rebuild=is_rebuild)
                works.set()
                yield Index(arguments, vectors, states, BatchIndexingManager(SQLIndexerAgent(vectors)), mending, works)
            finally:
                # After a signal, a thread may still store answers. It ends before its files are closed.
                await asyncio.get_running_loop().shutdown_default_executor()
    finally:
        with ThreadPoolExecutor(1) as thread:
            await asyncio.get_running_loop().run_in_executor(thread, vectors.close)


def _open_vectors(arguments: argparse.Namespace, chosen: IndexSettings, stop: threading.Event) -> SQLVectorStore:
    try:
        return SQLVectorStore(chosen, rebuild=arguments.rebuild, stop=stop)
    except MixedIndexError as exc:
        if not arguments.estimate_costs:
            raise
        sys.stderr.write(f"{exc} The estimate below is for --rebuild.\n")
        return SQLVectorStore(chosen, rebuild=True, stop=stop)  # nothing is replaced without ``Mending.mend``


async def _database(index: Index, chosen: IndexSettings) -> int:
    if chosen.database_url is None:
        raise ConfigurationError(
            "DATABASE_URL is not set; set it to the database to document, try the sample with --sample, or index "
            "--source conversations."
        )
    done, stats, tokens = await asyncio.to_thread(_read_database, index, chosen.database_url)
    if not await _may_index(index, stats, tokens):
        return ExitCode.DONE
    outcome = report.Outcome("database", stats)
    with report.IndexProgress("Indexing", outcome, stats["total_pending"]) as progress, _measured(index, outcome):
        await asyncio.to_thread(_index_database, index, done, outcome, progress)
    return _finish(index, outcome)


def _read_database(index: Index, url: SecretStr) -> tuple[Offered, dict[str, Any], int]:
    """Store the current structure of the database; return the work it leaves, its statistics and its tokens."""
    facts = read_database(url)
    done = index.states.sync_database(facts.tables, facts.relationships)
    logger.info("the database has %d tables and %d relationships", len(facts.tables), len(facts.relationships))
    pending = [index.mending.pending_texts(kind, names) for kind, names in done.removed.items()]
    manager = index.manager
    tokens = manager.estimate_embedding_costs(manager.unpaid([text for texts in pending for text in texts]))
    return done, manager.stats_of(*pending), int(tokens["estimated_tokens"])


def _index_database(index: Index, done: Offered, outcome: report.Outcome, progress: report.IndexProgress) -> None:
    def note(ended: Ended) -> None:
        outcome.count(ended)
        progress.reached(outcome.indexed + outcome.failed)

    vectors, states = index.vectors, index.states
    index.mending.mend()
    for kind, names in done.removed.items():
        remove(vectors, states, kind, names)
        outcome.removed += len(names)
    sweep(vectors, states, report.KINDS["database"])
    update_metadata(vectors, states, done.changed)
    manager = BatchIndexingManager(index.manager.indexer, note)
    outcome.results["tables"] = manager.batch_process_pending_tables(states)
    outcome.results["relationships"] = manager.batch_process_pending_relationships(states)


@contextmanager
def _measured(index: Index, outcome: report.Outcome) -> Iterator[None]:
    """Measure the time inside. After an error of the index, report the work done until then."""
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
    documents = DocumentStore(settings)
    try:
        await documents.check()
        return await _index_conversations(settings, index, documents)
    finally:
        await documents.close()


async def _index_conversations(settings: Settings, index: Index, documents: DocumentStore) -> int:
    arguments, vectors, allowed = index.arguments, index.vectors, _is_allowed(index.arguments)
    outcome = report.Outcome("conversations")

    def options(progress: report.IndexProgress) -> conversation_source.Options:
        return conversation_source.Options(settings, arguments.limit, allowed, progress.reached)

    conversation_source.require_allowed(vectors.provider, allowed=allowed)
    if arguments.estimate_costs or _limit_usd(arguments) is not None:  # reads all conversations once more
        with report.IndexProgress("Reading conversations", outcome) as progress:
            made = await conversation_source.estimate_conversations(
                documents, index.states, vectors, options(progress), index.mending.lost
            )
        outcome.before = {
            "pending_conversations": made.pending,
            "total_estimated_cost": index.manager.price(made.tokens),
            "batch_size": index.manager.batch_size,
            "estimated_batches": -(-made.unpaid // index.manager.batch_size),
        }
        if not await _may_index(index, outcome.before, made.tokens):
            return ExitCode.DONE
    with report.IndexProgress("Reading and indexing conversations", outcome) as progress, _measured(index, outcome):
        await asyncio.to_thread(index.mending.mend)
        counts = await conversation_source.index_conversations(
            documents, index.states, vectors, options(progress), outcome.count
        )
    # A vector that the states do not know may be in use if states were lost.
    if counts.is_complete and await asyncio.to_thread(sweep, vectors, index.states, (Kind.CONVERSATION,)):
        await asyncio.to_thread(vectors.ledger.keep_only, index.states.hashes().values())
    outcome.removed = counts.removed
    outcome.more = {name: getattr(counts, name) for name in ("read", "unclassified", "without_text", "changed")}
    return _finish(index, outcome)


def _is_allowed(arguments: argparse.Namespace) -> bool:
    return arguments.allow_external or load_openai_settings().allow_external


def _limit_usd(arguments: argparse.Namespace) -> float | None:
    """Return the most that may be spent without asking; None if there is no limit."""
    return None if arguments.yes else arguments.max_cost


async def _may_index(index: Index, stats: dict[str, Any], tokens: int) -> bool:
    """Show the estimate and return False for ``--estimate-costs``; otherwise raise if the price may not be spent."""
    arguments, identity = index.arguments, index.vectors.identity
    if index.vectors.stop.is_set():
        raise RunInterruptedError("Stopped; nothing was sent.")
    if arguments.estimate_costs:
        facts = {
            **stats,
            "estimated_tokens": tokens,
            "provider": identity.provider,
            "model": identity.model,
            "prices_from": price_source(),
        }
        if not report.give_json(facts, as_json=arguments.json, output=arguments.output):
            report.show_estimate(stats, tokens, str(identity), price_source())
        return False
    usd = stats["total_estimated_cost"]
    price = f"{report.in_dollars(usd)} for about {tokens:,} tokens with {identity.model}"
    index.works.clear()
    await report.require_affordable(_limit_usd(arguments), usd, price)
    index.works.set()
    return True


def _finish(index: Index, outcome: report.Outcome) -> int:
    outcome.is_interrupted = index.vectors.stop.is_set()
    _show(index, outcome)
    if outcome.is_interrupted:
        raise RunInterruptedError("Stopped; the same command resumes where this one stopped.")
    return ExitCode.INCOMPLETE if outcome.failed else ExitCode.DONE


def _show(index: Index, outcome: report.Outcome) -> None:
    vectors, counts = index.vectors, index.vectors.counts
    identity = vectors.identity
    logger.info(
        "%d items indexed, %d failed, %d removed in %.1f s: %d calls, %d tokens",
        *(outcome.indexed, outcome.failed, outcome.removed, outcome.duration_s, counts.calls, counts.tokens),
    )
    spent = vectors.ledger.totals(identity)
    facts = outcome.as_dict(identity, counts, spent, index.manager.price) | {"states": index.states.counts()}
    report.show_outcome(facts, as_json=index.arguments.json, output=index.arguments.output)


def _search(arguments: argparse.Namespace, chosen: IndexSettings) -> int:
    with IndexReader(chosen) as index:
        if arguments.source == "conversations":  # the question is most often a text of a customer
            conversation_source.require_allowed(index.provider, allowed=_is_allowed(arguments))
        hits = index.search(arguments.search, report.KINDS[arguments.source], arguments.limit or HITS)
    report.show_hits(hits, arguments.source, as_json=arguments.json, output=arguments.output)
    return ExitCode.DONE
