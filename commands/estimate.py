"""``cli.py estimate``: classify a random sample, keep its results, and estimate the time for the rest."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aggregator import aggregate_conversation
from batch_processor import BatchProcessor, Observers
from commands.flags import Command, add_model_flags, positive
from commands.subset_flags import add_subset_flags, subset_of
from config import Settings
from domain.prices import batch_prices, price_source
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, RunInterruptedError, SkippedDocumentError
from mongo_client import DocumentStore
from storage.extended_json import Document, id_key
from utils.process import stop_on_signals, tell_line
from worker.intake import RunOptions
from worker.left_out import LeftOut, count_in_time, count_left_out
from worker.progress import ConsoleProgress
from worker.timing import DocumentTiming, SampleRecorder, mean_tokens, measure_pace, quote_time

READ = 300  # minimum documents to read, to count those with nothing to classify, which needs no model
CANDIDATES = 1000  # minimum ids to draw, to count the pending documents that have a result already
FACTORS = (1, 2, 4)  # of the requested concurrency
COLD_LOAD_S = 0.5  # servers report shorter loads for a model that is already loaded
METHOD = (
    "prediction interval of the mean time per document (Student's t), with the sample's times assigned to the slots"
)

Report = dict[str, Any]


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
    add_subset_flags(group)
    add_model_flags(group)
    group.add_argument("--json", action="store_true", help="print the estimate as JSON")


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Classify and keep a sample, and print the estimate for the rest; INCOMPLETE if documents of the sample failed."""
    if settings.max_concurrent == "auto":
        raise ConfigurationError("an estimate requires a fixed concurrency; set --max-concurrent to a number.")
    recorder = SampleRecorder()
    # Copies take no model time, which is what the sample measures.
    options = RunOptions(dedupe=False, subset=subset_of(arguments, settings))
    observers = Observers([ConsoleProgress(sys.stderr)], recorder)
    processor = BatchProcessor(settings, options=options, observers=observers)
    connected = asyncio.Event()
    with stop_on_signals(processor.stop, connected.is_set):
        async with processor:
            connected.set()
            sample = await _draw_sample(processor.store, arguments.sample)
            if not sample.documents:
                counting = count_left_out(processor.store, queued=settings.batch_files_dir)
                left_out = await count_in_time(counting, tell_line)
                return _nothing_left(arguments, settings, left_out)
            start_s = time.monotonic()
            stats = await processor.process_batch(sample.documents)
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
        "in_quarantine": stats["in_quarantine"],
        "skipped": stats["skipped"],
        "leased_elsewhere": stats["leased_elsewhere"],
        "seconds": seconds,
        "load_s": recorder.load_s,
        # Few documents beyond the first of each call, which are slower on most servers.
        "is_rough": classified + failed < 3 * settings.most_in_flight,
    }
    report = make_report(settings, recorder.timings, remaining, facts)
    if arguments.json:
        print(json.dumps(report, indent=2, default=str))  # dates of prices
    else:
        print_report(Console(), report)
    return code


def _nothing_left(arguments: argparse.Namespace, settings: Settings, left_out: LeftOut) -> int:
    """Say that no document can be selected, and what a run leaves out; INCOMPLETE if a run would end so."""
    problems = [" ".join(problem) for problem in left_out.problems(settings.results_collection)]
    fields = {"left": 0, "sample": None, "not_selected": asdict(left_out)}
    _print_message(arguments, " ".join(["Nothing is left to classify.", *problems]), fields)
    return ExitCode.INCOMPLETE if left_out.is_all else ExitCode.DONE


async def _draw_sample(store: DocumentStore, size: int) -> DocumentSample:
    """Return up to *size* documents that are pending, or were left processing, and have no result."""
    count = await count_in_time(store.count("sweep"), tell_line)
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


def _why_no_estimate(stats: dict[str, Any], left: int) -> str | None:
    """Return the reason why the sample allows no estimate, or None."""
    failed, skipped = stats["failed"], stats["skipped"]
    done = counted(stats["successful"] + skipped, "document is", "documents are")
    if not left and not failed:
        return f"The sample was all that was left: {done} done now ({skipped} without text)."
    if not left:
        places = f"retry queue: {stats['in_retry_queue']}, quarantine: {stats['in_quarantine']}"
        return f"Only failed documents are left: {done} done now, {places}."
    if not stats["successful"]:
        return (
            f"There is no estimate: no document of the sample could be classified ({failed} failed, {skipped} without "
            f"text, {stats['leased_elsewhere']} leased by another worker). Run python cli.py doctor."
        )
    return None


def _print_message(arguments: argparse.Namespace, sentence: str, fields: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({**fields, "message": sentence}, indent=2))
    else:
        Console(soft_wrap=True).print(sentence, markup=False, highlight=False)


def make_report(
    settings: Settings, timings: Sequence[DocumentTiming], remaining: dict[str, int], sample: dict[str, Any]
) -> Report:
    """Return the estimate that ``--json`` prints: times in seconds, money in US dollars.

    *remaining* counts the documents after the sample: *left* without a result (extrapolated unless *is_left_exact*),
    *to_classify* of them with text, and *in_retry_queue*. *sample* holds the counts and times of the sample.
    """
    calls, to_classify = settings.most_in_flight, remaining["to_classify"]
    pace = measure_pace(timings, calls)
    paces = [(factor * calls, pace.with_calls(factor * calls)) for factor in FACTORS]
    means = mean_tokens(timings)
    totals = [mean * to_classify for mean in means or ()]
    names = ("prompt_mean", "reply_mean", "prompt_total", "reply_total")
    return {
        "place": f"{settings.db_name}.{settings.source_collection}",
        "model": settings.model or "",
        "max_concurrent": calls,
        **remaining,
        "sample": sample,
        "time": {**asdict(quote_time(pace, to_classify)), "level": 0.9, "method": METHOD},
        "documents_per_s": pace.documents_per_s,
        "server": {
            "wait_share": pace.wait_share,
            "is_busy": pace.is_server_busy,
            "slots": pace.slots if pace.is_server_busy else None,
        },
        "concurrency": [
            {
                "calls": at_once,
                "expected_s": quote_time(each, to_classify).expected_s,
                "is_at_best": not each.is_server_busy and at_once > calls,
            }
            for at_once, each in paces
        ],
        "tokens": dict(zip(names, (*means, *totals), strict=True)) if means else None,
        "openai_batch": {
            "source": price_source(),
            "prices": [
                {**asdict(price), "is_assumed": price.is_assumed}
                for price in (batch_prices(totals[0], totals[1]) if means else ())
            ],
        },
    }


def print_report(console: Console, report: Report) -> None:
    """Print *report* as a table."""
    title = f"{report['place']}, with {report['model']}, {counted(report['max_concurrent'], 'concurrent call')}"
    table = Table(title=escape(title), box=None, show_header=False, title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("left", _left(report))
    table.add_row("time", _time(report["time"]))
    table.add_row("speed", f"{report['documents_per_s']:.3g} documents per second")
    table.add_row("tokens", _tokens(report["tokens"]))
    table.add_row("concurrency", _concurrency(report["server"], report["concurrency"]))
    table.add_row("OpenAI", _openai(**report["openai_batch"]))
    table.add_row("sample", _sample(report["sample"], report["max_concurrent"]))
    console.print(table)


def duration_text(seconds: float) -> str:
    """Return *seconds* with one or two units, such as ``2 h 15 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def _left(report: Report) -> str:
    about = "" if report["is_left_exact"] else "about "
    text = f"{about}{counted(report['left'], 'document')} without a result"
    if report["to_classify"] != report["left"]:
        text += f", about {report['to_classify']:,} of them with text to classify"
    if report["in_retry_queue"]:
        text += f"; plus {counted(report['in_retry_queue'], 'failed document')} in the retry queue"
    return text


def _time(quote: Report) -> str:
    expected = f"[bold]{duration_text(quote['expected_s'])}[/]"
    if quote["low_s"] is None:
        return f"{expected}; the sample is too small for an interval"
    return f"{expected}; with 90 % confidence {duration_text(quote['low_s'])} to {duration_text(quote['high_s'])}"


def _tokens(tokens: dict[str, float] | None) -> str:
    if tokens is None:
        return "not reported by the server"
    return (
        "{prompt_mean:,.0f} prompt and {reply_mean:,.0f} reply per document; {prompt_total:,.0f} and {reply_total:,.0f} "
        "in total"
    ).format(**tokens)


def _concurrency(server: Report, quotes: Sequence[Report]) -> str:
    share, slots = server["wait_share"], server["slots"]
    if slots is not None:
        return (
            f"more calls would not help: the server has {counted(slots, 'slot')} and all are busy; calls spend "
            f"{share:.0%} of their time waiting. --max-concurrent {slots} is as fast."
        )
    times = ", ".join(f"{quote['calls']} calls: {duration_text(quote['expected_s'])}" for quote in quotes[1:])
    if share is None:
        return f"at best {times}. This server does not report whether calls wait for a slot."
    return f"at best {times}, if the server has enough slots. Calls now wait {share:.0%} of their time."


def _openai(source: str, prices: Sequence[Report]) -> str:
    if not prices:
        return "the cost of the OpenAI Batch API is unknown: it depends on the tokens"
    costs = ", ".join(f"{price['model']} {_dollars(price['usd'])}" for price in prices)
    assumed = [price["model"] for price in prices if price["is_assumed"]]
    since = max((price["since"] for price in prices if price["since"]), default=None)
    dates = [f"batch rates of {since}"] if since else []
    dates += [f"half the usual price assumed for {', '.join(assumed)}"] if assumed else []
    return (
        f"the same tokens on the OpenAI Batch API: {costs} ({source}, {'; '.join(dates)}; its tokenizer differs "
        "slightly). [bold]Customer text would leave your network.[/]"
    )


def _dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 1 else f"${usd:.2g}" if usd < 0.01 else f"${usd:.2f}"


def _sample(facts: Report, calls: int) -> str:
    text = f"{facts['classified']} classified in {duration_text(facts['seconds'])}, kept as results"
    text += f"; {facts['skipped']} without text" if facts["skipped"] else ""
    if facts["failed"]:
        in_quarantine = facts["in_quarantine"]
        where = f"quarantine: {in_quarantine} (--retry-failed)" if in_quarantine else "retried by the next run"
        text += f"; [red]{facts['failed']} failed[/], {where}"
    text += f"; {facts['leased_elsewhere']} leased by another worker" if facts["leased_elsewhere"] else ""
    if facts["load_s"] >= COLD_LOAD_S:
        text += f"; loading the model took {duration_text(facts['load_s'])}, not included in the time above"
    if facts["is_rough"]:
        text += f". The sample is too small for {counted(calls, 'concurrent call')}; use --sample {4 * calls}."
    return text


COMMAND = Command(
    "estimate", "Estimate the remaining time from a random sample; its results are kept.", _add_flags, _run
)
