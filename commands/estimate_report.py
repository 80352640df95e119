"""The report of ``cli.py estimate``, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domain.prices import BatchPrice, price_source
from domain.text import counted
from worker.timing import Pace, TimeQuote, quote_time

FACTORS = (1, 2, 4)  # of the requested concurrency
COLD_LOAD_S = 0.5  # servers report shorter loads for a model that is already loaded
METHOD = (
    "prediction interval of the mean time per document (Student's t), with the sample's times assigned to the slots"
)


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """Counts of the sample, in documents. *seconds* is its duration, *load_s* the load time of the model."""

    asked_for: int
    classified: int
    failed: int
    skipped: int
    leased_elsewhere: int
    seconds: float
    load_s: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate for the documents that remain after the sample.

    *left* is the number of documents without a result, extrapolated unless *is_exact*; *to_classify* of them have text
    to classify. *tokens* are the mean prompt and reply tokens per document, None if the server does not report them.
    """

    place: str
    model: str
    calls: int
    left: int
    is_exact: bool
    to_classify: int
    in_retry_queue: int
    sample: SampleFacts
    pace: Pace
    tokens: tuple[float, float] | None
    prices: list[BatchPrice]

    @property
    def is_rough(self) -> bool:
        """True if the sample has few documents beyond the first of each call, which are slower on most servers."""
        return self.sample.classified + self.sample.failed < 3 * self.calls

    def quotes(self) -> list[tuple[int, Pace, TimeQuote]]:
        """Return calls, pace and time for each of FACTORS; the first is the requested concurrency."""
        paces = [(factor * self.calls, self.pace.with_calls(factor * self.calls)) for factor in FACTORS]
        return [(calls, pace, quote_time(pace, self.to_classify)) for calls, pace in paces]

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for ``--json``: times in seconds, money in US dollars."""
        pace, quotes = self.pace, self.quotes()
        tokens = None
        if self.tokens is not None:
            prompt, reply = self.tokens
            totals = {"prompt_total": prompt * self.to_classify, "reply_total": reply * self.to_classify}
            tokens = {"prompt_mean": prompt, "reply_mean": reply, **totals}
        return {
            "place": self.place,
            "model": self.model,
            "max_concurrent": self.calls,
            "left": self.left,
            "is_left_exact": self.is_exact,
            "to_classify": self.to_classify,
            "in_retry_queue": self.in_retry_queue,
            "sample": {**asdict(self.sample), "is_rough": self.is_rough},
            "time": {**asdict(quotes[0][2]), "level": 0.9, "method": METHOD},
            "documents_per_s": pace.documents_per_s,
            "server": {
                "wait_share": pace.wait_share,
                "is_busy": pace.is_server_busy,
                "slots": pace.slots if pace.is_server_busy else None,
            },
            "concurrency": [
                {
                    "calls": calls,
                    "expected_s": quote.expected_s,
                    "is_at_best": not each.is_server_busy and calls > self.calls,
                }
                for calls, each, quote in quotes
            ],
            "tokens": tokens,
            "openai_batch": {
                "source": price_source(),
                "prices": [{**asdict(price), "is_assumed": price.is_assumed} for price in self.prices],
            },
        }


def print_estimate(console: Console, estimate: Estimate) -> None:
    """Print *estimate* as a table."""
    quotes = estimate.quotes()
    asked = quotes[0][2]
    title = f"{estimate.place}, with {estimate.model}, {counted(estimate.calls, 'concurrent call')}"
    table = Table(title=escape(title), box=None, show_header=False, title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in (
        ("left", _left(estimate)),
        ("time", f"[bold]{duration_text(asked.expected_s)}[/]; {_interval(asked)}"),
        ("speed", f"{estimate.pace.documents_per_s:.3g} documents per second"),
        ("tokens", _tokens(estimate)),
        ("concurrency", _concurrency(estimate, quotes)),
        ("OpenAI", _openai(estimate)),
        ("sample", _sample(estimate)),
    ):
        table.add_row(name, text)
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


def _left(estimate: Estimate) -> str:
    about = "" if estimate.is_exact else "about "
    text = f"{about}{counted(estimate.left, 'document')} without a result"
    if estimate.to_classify != estimate.left:
        text += f", about {estimate.to_classify:,} of them with text to classify"
    if estimate.in_retry_queue:
        text += f"; plus {counted(estimate.in_retry_queue, 'failed document')} in the retry queue"
    return text


def _interval(quote: TimeQuote) -> str:
    if quote.low_s is None or quote.high_s is None:
        return "the sample is too small for an interval"
    return f"with 90 % confidence {duration_text(quote.low_s)} to {duration_text(quote.high_s)}"


def _tokens(estimate: Estimate) -> str:
    if estimate.tokens is None:
        return "not reported by the server"
    prompt, reply = estimate.tokens
    return (
        f"{prompt:,.0f} prompt and {reply:,.0f} reply per document; {prompt * estimate.to_classify:,.0f} and "
        f"{reply * estimate.to_classify:,.0f} in total"
    )


def _concurrency(estimate: Estimate, quotes: list[tuple[int, Pace, TimeQuote]]) -> str:
    pace = estimate.pace
    if pace.is_server_busy and pace.wait_share is not None:
        return (
            f"more calls would not help: the server has {counted(pace.slots, 'slot')} and all are busy; calls spend "
            f"{pace.wait_share:.0%} of their time waiting. --max-concurrent {pace.slots} is as fast."
        )
    times = ", ".join(f"{calls} calls: {duration_text(quote.expected_s)}" for calls, _, quote in quotes[1:])
    if pace.wait_share is None:
        return f"at best {times}. This server does not report whether calls wait for a slot."
    return f"at best {times}, if the server has enough slots. Calls now wait {pace.wait_share:.0%} of their time."


def _openai(estimate: Estimate) -> str:
    if not estimate.prices:
        return "the cost of the OpenAI Batch API is unknown: it depends on the tokens"
    costs = ", ".join(f"{price.model} {_dollars(price.usd)}" for price in estimate.prices)
    assumed = [price.model for price in estimate.prices if price.is_assumed]
    since = max((price.since for price in estimate.prices if price.since), default=None)
    dates = [f"batch rates of {since}"] if since else []
    dates += [f"half the usual price assumed for {', '.join(assumed)}"] if assumed else []
    return (
        f"the same tokens on the OpenAI Batch API: {costs} ({price_source()}, {'; '.join(dates)}; its tokenizer differs "
        "slightly). [bold]Customer text would leave your network.[/]"
    )


def _dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 1 else f"${usd:.2g}" if usd < 0.01 else f"${usd:.2f}"


def _sample(estimate: Estimate) -> str:
    facts = estimate.sample
    text = f"{facts.classified} classified in {duration_text(facts.seconds)}, kept as results"
    text += f"; {facts.skipped} without text" if facts.skipped else ""
    text += f"; [red]{facts.failed} failed[/], retried by the next run" if facts.failed else ""
    text += f"; {facts.leased_elsewhere} leased by another worker" if facts.leased_elsewhere else ""
    if facts.load_s >= COLD_LOAD_S:
        text += f"; loading the model took {duration_text(facts.load_s)}, not included in the time above"
    if estimate.is_rough:
        calls = counted(estimate.calls, "concurrent call")
        text += f". The sample is too small for {calls}; use --sample {4 * estimate.calls}."
    return text
