"""``cli.py estimate``: classify a random sample, keep its results, and estimate the time for the rest."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from batch_processor import BatchProcessor, Observers
from commands.document_sample import DocumentSample, draw_sample
from commands.estimate_report import Estimate, SampleFacts, print_estimate
from commands.flags import Command, add_model_flags, positive
from config import Settings
from domain.prices import batch_prices
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, RunInterruptedError
from utils.process import stop_on_signals
from worker.intake import RunOptions
from worker.progress import ConsoleProgress
from worker.timing import DocumentTiming, SampleRecorder, mean_tokens, measure_pace

SAMPLE = 20
CHECKPOINT = "checkpoint.json"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``estimate``."""
    group = parser.add_argument_group("estimate")
    group.add_argument(
        "--sample", type=positive, default=SAMPLE, metavar="N", help=f"number of documents to classify ({SAMPLE})"
    )
    group.add_argument(
        "--max-concurrent", "--concurrent", type=int, metavar="N", help="concurrent model calls (MAX_CONCURRENT; 5)"
    )
    add_model_flags(group)
    group.add_argument("--json", action="store_true", help="print the estimate as JSON")


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Classify and keep a sample, and print the estimate for the rest.

    Returns DONE, or INCOMPLETE if documents of the sample failed.

    Raises:
        ConfigurationError: The number of concurrent calls is not fixed.
        RunInterruptedError: It was stopped; the results so far are kept.
        TriadError: As for a run.
    """
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
            sample = await draw_sample(processor.store, arguments.sample)
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
    facts = SampleFacts(
        asked_for=arguments.sample,
        classified=stats["successful"],
        failed=stats["failed"],
        skipped=stats["skipped"],
        leased_elsewhere=stats["leased_elsewhere"],
        seconds=seconds,
        load_s=recorder.load_s,
    )
    left = max(0, sample.left - stats["documents_processed"] - stats["already_done"])
    code = ExitCode.INCOMPLETE if facts.failed else ExitCode.DONE
    missing = _why_no_estimate(facts, left)
    if missing:
        counts = {"classified": facts.classified, "failed": facts.failed}
        _print_message(arguments, missing, {"left": left, "sample": counts})
        return code
    estimate = _estimate(settings, recorder.timings, sample, facts, stats["in_retry_queue"], left)
    if arguments.json:
        print(json.dumps(estimate.as_dict(), indent=2, default=str))  # dates of prices
    else:
        print_estimate(Console(), estimate)
    return code


async def _classify(processor: BatchProcessor, sample: DocumentSample) -> dict[str, Any]:
    """Classify the sample with every safeguard of a run; keep the checkpoint of an interrupted run."""
    before = processor.files.read_state(CHECKPOINT)
    try:
        return await processor.process_batch(sample.documents)
    finally:
        if before is not None and before.get("finished") is False:
            processor.files.write_state(CHECKPOINT, before)


def _why_no_estimate(facts: SampleFacts, left: int) -> str | None:
    """Return the reason why the sample allows no estimate, or None."""
    done = counted(facts.classified + facts.skipped, "document is", "documents are")
    if not left and not facts.failed:
        return f"The sample was all that was left: {done} done now ({facts.skipped} without text)."
    if not facts.classified:
        return (
            f"There is no estimate: no document of the sample could be classified ({facts.failed} failed, {facts.skipped} "
            f"without text, {facts.leased_elsewhere} leased by another worker). Run python cli.py doctor."
        )
    if not left:
        return f"Only the retry queue is left: {done} done now, {facts.failed} failed."
    return None


def _estimate(
    settings: Settings,
    timings: Sequence[DocumentTiming],
    sample: DocumentSample,
    facts: SampleFacts,
    in_retry_queue: int,
    left: int,
) -> Estimate:
    askable = round(sample.left * sample.askable_share) - facts.classified - facts.failed
    to_classify = min(left, max(0, askable))
    tokens = mean_tokens(timings)
    return Estimate(
        place=f"{settings.db_name}.{settings.source_collection}",
        model=settings.model or "",
        calls=settings.most_concurrent,
        left=left,
        is_exact=sample.is_exact,
        to_classify=to_classify,
        in_retry_queue=in_retry_queue,
        sample=facts,
        pace=measure_pace(timings, settings.most_concurrent),
        tokens=tokens,
        prices=batch_prices(tokens[0] * to_classify, tokens[1] * to_classify) if tokens else [],
    )


def _print_message(arguments: argparse.Namespace, sentence: str, fields: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({**fields, "message": sentence}, indent=2))
    else:
        Console(soft_wrap=True).print(sentence, markup=False, highlight=False)


COMMAND = Command("estimate", "Estimate the remaining time from a random sample; its results are kept.", add_flags, run)
