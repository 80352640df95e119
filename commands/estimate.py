"""``cli.py estimate``: what the rest of the work will take, from a random sample whose results are kept."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import replace
from typing import Any

from rich.console import Console

from batch_processor import BatchProcessor, Observers
from commands.document_sample import DocumentSample, draw_sample
from commands.estimate_report import Estimate, SampleFacts, print_estimate
from commands.flags import Command, add_model_flags, positive
from config import Settings
from domain.prices import batch_prices
from error_handler import ConfigurationError, ExitCode, RunInterruptedError
from utils.process import stop_on_signals
from worker.intake import RunOptions
from worker.progress import ConsoleProgress
from worker.timing import SampleRecorder, mean_tokens, measure_pace

SAMPLE = 20
CHECKPOINT = "checkpoint.json"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    group = parser.add_argument_group("how to estimate")
    group.add_argument(
        "--sample", type=positive, default=SAMPLE, metavar="N", help=f"documents to classify for it ({SAMPLE})"
    )
    group.add_argument(
        "--max-concurrent", "--concurrent", type=int, help="model calls in flight at once (MAX_CONCURRENT; 5)"
    )
    add_model_flags(group)
    group.add_argument("--json", action="store_true", help="the estimate as JSON")


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Draw, classify and keep a sample, and print what the rest will take.

    Returns DONE, or INCOMPLETE where documents of the sample failed.

    Raises:
        ConfigurationError: The number of calls in flight is not fixed.
        RunInterruptedError: It was stopped; what was classified by then is kept.
        TriadError: As for a run.
    """
    if settings.max_concurrent == "auto":
        raise ConfigurationError(
            "an estimate is for a fixed number of calls in flight; give one with --max-concurrent."
        )
    recorder = SampleRecorder()
    # A copy takes no time with the model, and the sample is there to measure that.
    observers = Observers(ConsoleProgress(sys.stderr), recorder)
    processor = BatchProcessor(settings, options=RunOptions(dedupe=False), observers=observers)
    connected = asyncio.Event()
    with stop_on_signals(processor.stop, connected.is_set):
        async with processor:
            connected.set()
            sample = await draw_sample(processor.store, arguments.sample)
            if not sample.documents:
                _say(arguments, "Nothing is left to classify.", {"left": sample.left, "sample": None})
                return ExitCode.DONE
            start_s = time.monotonic()
            stats = await _classify(processor, sample)
            seconds = time.monotonic() - start_s
    if stats["interrupted"]:
        raise RunInterruptedError(
            f"Stopped after {stats['documents_processed']} of the {len(sample.documents)} documents of the sample; their "
            "results are kept, and there is no estimate."
        )
    code = ExitCode.INCOMPLETE if stats["failed"] else ExitCode.DONE
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
    missing = _why_no_estimate(facts, left)
    if missing:
        _say(arguments, missing, {"left": left, "sample": {"classified": facts.classified, "failed": facts.failed}})
        return code
    askable = round(sample.left * sample.askable_share) - facts.classified - facts.failed
    estimate = _estimate(settings, recorder, facts, stats, replace(sample, left=left), min(left, max(0, askable)))
    if arguments.json:
        print(json.dumps(estimate.as_dict(), indent=2))
    else:
        print_estimate(Console(), estimate)
    return code


async def _classify(processor: BatchProcessor, sample: DocumentSample) -> dict[str, Any]:
    """Classify the sample with every safeguard of a run, and leave an interrupted run's checkpoint as it was."""
    before = processor.files.read_state(CHECKPOINT)
    try:
        return await processor.process_batch(sample.documents)
    finally:
        if before is not None and before.get("finished") is False:
            processor.files.write_state(CHECKPOINT, before)


def _why_no_estimate(facts: SampleFacts, left: int) -> str | None:
    """Return the sentence for a sample that leaves nothing to quote, or tells nothing; None where there is a quote."""
    done = facts.classified + facts.skipped
    if not left and not facts.failed:
        return f"The sample was all that was left: {done} documents are done now ({facts.skipped} had nothing to classify)."
    if not facts.classified:
        return (
            f"No document of the sample could be classified ({facts.failed} failed, {facts.skipped} had nothing to "
            f"classify, {facts.leased_elsewhere} are in the hands of another worker), so there is no estimate; "
            "python cli.py doctor tells what is wrong with the servers."
        )
    if not left:
        return f"Nothing but the retry queue is left: {done} documents are done now, and {facts.failed} failed."
    return None


def _estimate(
    settings: Settings,
    recorder: SampleRecorder,
    facts: SampleFacts,
    stats: dict[str, Any],
    sample: DocumentSample,
    to_classify: int,
) -> Estimate:
    tokens = mean_tokens(recorder.timings)
    return Estimate(
        place=f"{settings.db_name}.{settings.source_collection}",
        model=settings.model or "",
        calls=settings.most_concurrent,
        left=sample.left,
        is_exact=sample.is_exact,
        to_classify=to_classify,
        in_retry_queue=stats["in_retry_queue"],
        sample=facts,
        pace=measure_pace(recorder.timings, settings.most_concurrent),
        tokens=tokens,
        prices=batch_prices(tokens[0] * to_classify, tokens[1] * to_classify) if tokens else [],
    )


def _say(arguments: argparse.Namespace, sentence: str, fields: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({**fields, "message": sentence}, indent=2))
    else:
        Console(soft_wrap=True).print(sentence, markup=False, highlight=False)


COMMAND = Command(
    "estimate", "Say how long the rest will take, from a random sample whose results are kept", add_flags, run
)
