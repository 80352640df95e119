"""``cli.py estimate``: classify a random sample, keep its results, and estimate the time for the rest."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aggregator import aggregate_conversation
from batch_processor import BatchProcessor, Observers
from commands.estimate_report import make_report, print_report
from commands.flags import Command, add_model_flags, positive
from config import Settings
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, RunInterruptedError, SkippedDocumentError
from mongo_client import DocumentStore
from storage.extended_json import Document, id_key
from utils.process import stop_on_signals
from worker.intake import RunOptions
from worker.progress import ConsoleProgress
from worker.timing import SampleRecorder

CHECKPOINT = "checkpoint.json"
READ = 300  # minimum documents to read, to count those with nothing to classify, which needs no model
CANDIDATES = 1000  # minimum ids to draw, to count the pending documents that have a result already


@dataclass(frozen=True, slots=True)
class DocumentSample:
    """*documents* drawn at random; *left* is the number without a result before, these included.

    *left* is exact if *is_exact*, else the pending documents times the share of them that has no result. *askable* of
    them have something to classify, by the share among up to READ of them.
    """

    documents: list[Document]
    left: int
    is_exact: bool
    askable: int


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("estimate")
    group.add_argument("--sample", type=positive, default=20, metavar="N", help="number of documents to classify (20)")
    group.add_argument(
        "--max-concurrent", "--concurrent", type=int, metavar="N", help="concurrent model calls (MAX_CONCURRENT; 5)"
    )
    add_model_flags(group)
    group.add_argument("--json", action="store_true", help="print the estimate as JSON")


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Classify and keep a sample, and print the estimate for the rest; INCOMPLETE if documents of the sample failed."""
    if settings.max_concurrent == "auto":
        raise ConfigurationError("an estimate requires a fixed concurrency; set --max-concurrent to a number.")
    recorder = SampleRecorder()
    # Copies take no model time, which is what the sample measures.
    observers = Observers([ConsoleProgress(sys.stderr)], recorder)
    processor = BatchProcessor(settings, options=RunOptions(dedupe=False), observers=observers)
    connected = asyncio.Event()
    with stop_on_signals(processor.stop, connected.is_set):
        async with processor:
            connected.set()
            sample = await _draw_sample(processor.store, arguments.sample)
            if not sample.documents:
                _print_message(arguments, "Nothing is left to classify.", {"left": sample.left, "sample": None})
                return ExitCode.DONE
            start_s = time.monotonic()
            stats = await _classify(processor, sample)
            seconds = time.monotonic() - start_s
    if stats["interrupted"]:
        raise RunInterruptedError(
            f"Stopped after {stats['documents_processed']} of {counted(len(sample.documents), 'document')} of the "
            "sample. Their results are kept; there is no estimate."
        )
    classified, failed = stats["successful"], stats["failed"]
    left = max(0, sample.left - stats["documents_processed"] - stats["already_done"])
    code = ExitCode.INCOMPLETE if failed else ExitCode.DONE
    missing = _why_no_estimate(stats, left)
    if missing:
        _print_message(arguments, missing, {"left": left, "sample": {"classified": classified, "failed": failed}})
        return code
    remaining = {
        "left": left,
        "is_left_exact": sample.is_exact,
        "to_classify": min(left, max(0, sample.askable - classified - failed)),
        "in_retry_queue": stats["in_retry_queue"],
    }
    facts = {
        "asked_for": arguments.sample,
        "classified": classified,
        "failed": failed,
        "skipped": stats["skipped"],
        "leased_elsewhere": stats["leased_elsewhere"],
        "seconds": seconds,
        "load_s": recorder.load_s,
        # Few documents beyond the first of each call, which are slower on most servers.
        "is_rough": classified + failed < 3 * settings.most_concurrent,
    }
    report = make_report(settings, recorder.timings, remaining, facts)
    if arguments.json:
        print(json.dumps(report, indent=2, default=str))  # dates of prices
    else:
        print_report(Console(), report)
    return code


async def _draw_sample(store: DocumentStore, size: int) -> DocumentSample:
    """Return up to *size* documents that are pending, or were left processing, and have no result."""
    count = await store.count("sweep")
    drawn = {id_key(value): value for value in await store.sample_ids("sweep", max(CANDIDATES, size))}
    done = await store.result_keys(list(drawn.values()))
    undone = [value for key, value in drawn.items() if key not in done]
    is_exact = len(drawn) >= count
    left = len(undone) if is_exact else round(count * len(undone) / max(1, len(drawn)))
    wanted = undone[: max(READ, size)]
    documents = {id_key(document["_id"]): document for document in await store.read_documents("sweep", wanted)}
    # In the order drawn: in the order of ids, the first workers would get the oldest documents.
    in_order = [documents[key] for key in map(id_key, wanted) if key in documents]
    askable = round(left * sum(map(_is_askable, in_order)) / max(1, len(in_order)))
    return DocumentSample(in_order[:size], left, is_exact, askable)


def _is_askable(document: Document) -> bool:
    try:
        aggregate_conversation(document)
    except SkippedDocumentError:
        return False
    return True


async def _classify(processor: BatchProcessor, sample: DocumentSample) -> dict[str, Any]:
    """Classify the sample with every safeguard of a run; keep the checkpoint of an interrupted run."""
    before = processor.files.read_state(CHECKPOINT)
    try:
        return await processor.process_batch(sample.documents)
    finally:
        if before is not None and before.get("finished") is False:
            processor.files.write_state(CHECKPOINT, before)


def _why_no_estimate(stats: dict[str, Any], left: int) -> str | None:
    """Return the reason why the sample allows no estimate, or None."""
    failed, skipped = stats["failed"], stats["skipped"]
    done = counted(stats["successful"] + skipped, "document is", "documents are")
    if not left and not failed:
        return f"The sample was all that was left: {done} done now ({skipped} without text)."
    if not stats["successful"]:
        return (
            f"There is no estimate: no document of the sample could be classified ({failed} failed, {skipped} without "
            f"text, {stats['leased_elsewhere']} leased by another worker). Run python cli.py doctor."
        )
    if not left:
        return f"Only the retry queue is left: {done} done now, {failed} failed."
    return None


def _print_message(arguments: argparse.Namespace, sentence: str, fields: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({**fields, "message": sentence}, indent=2))
    else:
        Console(soft_wrap=True).print(sentence, markup=False, highlight=False)


COMMAND = Command(
    "estimate", "Estimate the remaining time from a random sample; its results are kept.", _add_flags, _run
)
