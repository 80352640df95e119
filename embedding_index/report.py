"""What ``cli.py index`` shows: a progress bar, the outcome, prices and hits."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from embedding_index.items import Hit, Kind
from utils.atomic_file import replace_file

LINE_EVERY_S = 5.0
SHOWN_PROBLEMS = 10
TABLE_WIDTH = 120
EXCERPT_CHARACTERS = 200


@dataclass(slots=True)
class Outcome:
    """What one run did. Tokens are those that were billed or, where the provider does not tell, estimated.

    *results* holds for each kind name -> whether it is indexed now, as BatchIndexingManager returns it; conversations
    are too many to be named, so they are only counted. *before* is ``get_processing_stats`` before the run.
    """

    source: str
    provider: str
    model: str
    dimensions: int | None
    before: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, bool]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    indexed: int = 0
    failed: int = 0
    reused: int = 0
    removed: int = 0
    calls: int = 0
    tokens: int = 0
    cost_usd: float | None = 0.0
    duration_s: float = 0.0
    is_interrupted: bool = False
    more: dict[str, int] = field(default_factory=dict)

    def count(self, kind: Kind, name: str, problem: str | None) -> None:
        """Count one item that ended; *problem* None says that it is indexed."""
        if problem is None:
            self.indexed += 1
        else:
            self.failed += 1
            self.problems[f"{kind}:{name}"] = problem

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        ended = self.indexed + self.failed
        return {
            "source": self.source,
            "provider": self.provider,
            "model": self.model,
            "dimensions": self.dimensions,
            "stats": self.before,
            **self.results,
            "indexed": self.indexed,
            "failed": self.failed,
            "success_rate": self.indexed / ended if ended else None,
            "reused": self.reused,
            "removed": self.removed,
            **self.more,
            "calls": self.calls,
            "tokens": self.tokens,
            "cost_usd": self.cost_usd,
            "duration_s": round(self.duration_s, 3),
            "items_per_s": round(ended / self.duration_s, 1) if ended and self.duration_s else None,
            "interrupted": self.is_interrupted,
            "problems": self.problems,
        }


class IndexProgress:
    """How many items of how many have ended, on stderr: a bar on a terminal, else a line now and then; use as ``with``."""

    def __init__(self, what: str, total: int | None = None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._what, self._total = what, total
        self._ended = self._failed = 0
        self._written_at = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> IndexProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._ended:
            self._write()

    def ended(self, ended: Sequence[tuple[object, str | None]]) -> None:
        """Count items that ended, each with None or its problem."""
        self._failed += sum(problem is not None for _, problem in ended)
        self.reached(self._ended + len(ended))

    def reached(self, number: int, of: int | None = None) -> None:
        """Show that *number* items have ended, of *of* where that has changed."""
        self._ended, self._total = number, self._total if of is None else of
        if self._bar is None and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=number, total=self._total)
        elif time.monotonic() - self._written_at >= LINE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        of = "" if self._total is None else f" of {self._total}"
        self._console.print(Text(f"{self._what}: {self._ended}{of}, {self._failed} failed"))


def show_outcome(outcome: Outcome, *, as_json: bool, output: Path | None) -> None:
    """Print *outcome*, and write it to *output*."""
    text = json.dumps(outcome.as_dict(), indent=2, ensure_ascii=False)
    if output is not None:
        replace_file(output, text.encode())
    if as_json:
        sys.stdout.write(text + "\n")
        return
    console = Console(soft_wrap=True, highlight=False)
    facts = outcome.as_dict()
    console.print(f"{outcome.indexed} indexed, {outcome.failed} failed, {outcome.removed} removed.", markup=False)
    for name, count in outcome.more.items():
        console.print(f"  {name.replace('_', ' ')}: {count}", markup=False)
    if facts["success_rate"] is not None:
        console.print(f"Success rate {facts['success_rate']:.1%}, {facts['items_per_s']} items/s.", markup=False)
    console.print(
        f"{outcome.calls} calls, {outcome.tokens:,} tokens, {in_dollars(outcome.cost_usd)}; "
        f"{outcome.reused} vectors were there already ({outcome.model} of {outcome.provider}).",
        markup=False,
    )
    for name, problem in list(outcome.problems.items())[:SHOWN_PROBLEMS]:
        console.print(Text(f"  {name}: {problem}"))
    if len(outcome.problems) > SHOWN_PROBLEMS:
        console.print(f"  ... and {len(outcome.problems) - SHOWN_PROBLEMS} more: --json shows all", markup=False)


def show_estimate(stats: dict[str, Any], tokens: int, model: str, source: str) -> None:
    """Print what indexing would send and cost."""
    console = Console(soft_wrap=True, highlight=False)
    for name, value in stats.items():
        shown = in_dollars(value) if name.endswith("cost") else value
        console.print(f"{name.replace('_', ' ')}: {shown}", markup=False)
    console.print(f"About {tokens:,} tokens for {model}; prices from {source}. Nothing was sent.", markup=False)


def show_hits(hits: Sequence[Hit], *, as_json: bool) -> None:
    """Print *hits*, the best first."""
    if as_json:
        rows = [
            {
                "kind": hit.kind,
                "name": hit.name,
                "similarity": round(hit.similarity, 4),
                **hit.metadata,
                "text": hit.text,
            }
            for hit in hits
        ]
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # elsewhere than on a terminal it is 80
    table = Table(box=None, title_justify="left")
    table.add_column("like", justify="right")
    table.add_column("what", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("about", overflow="fold")
    for hit in hits:
        table.add_row(f"{hit.similarity:.2f}", Text(hit.kind.value), Text(hit.name), Text(_about(hit)))
    console.print(table if hits else "Nothing is indexed yet that could be found: run cli.py index --batch first.")


def _about(hit: Hit) -> str:
    if hit.kind is Kind.CONVERSATION:
        labels = (str(hit.metadata.get(name) or "") for name in ("intent", "topic", "sentiment", "categorization"))
        return ", ".join(label for label in labels if label)
    text = " ".join((hit.text or "").split())
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 3] + "..."


def in_dollars(usd: float | None) -> str:
    """Return *usd* for people."""
    if usd is None:
        return "price unknown"
    return "free" if not usd else f"{usd:.6f} US dollars" if usd < 0.01 else f"{usd:.2f} US dollars"
