"""The report of ``cli.py estimate``, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from config import Settings
from domain.prices import batch_prices, price_source
from domain.text import counted
from worker.timing import DocumentTiming, mean_tokens, measure_pace, quote_time

FACTORS = (1, 2, 4)  # of the requested concurrency
COLD_LOAD_S = 0.5  # servers report shorter loads for a model that is already loaded
METHOD = (
    "prediction interval of the mean time per document (Student's t), with the sample's times assigned to the slots"
)

Report = dict[str, Any]


def make_report(
    settings: Settings, timings: Sequence[DocumentTiming], remaining: dict[str, int], sample: dict[str, Any]
) -> Report:
    """Return the estimate that ``--json`` prints: times in seconds, money in US dollars.

    *remaining* counts the documents after the sample: *left* without a result (extrapolated unless *is_left_exact*),
    *to_classify* of them with text, and *in_retry_queue*. *sample* holds the counts and times of the sample.
    """
    calls, to_classify = settings.most_concurrent, remaining["to_classify"]
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
    text += f"; [red]{facts['failed']} failed[/], retried by the next run" if facts["failed"] else ""
    text += f"; {facts['leased_elsewhere']} leased by another worker" if facts["leased_elsewhere"] else ""
    if facts["load_s"] >= COLD_LOAD_S:
        text += f"; loading the model took {duration_text(facts['load_s'])}, not included in the time above"
    if facts["is_rough"]:
        text += f". The sample is too small for {counted(calls, 'concurrent call')}; use --sample {4 * calls}."
    return text
