"""The result table of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

HEAD = ("measure", "product", "reference", "ratio", "target", "")


@dataclass(frozen=True)
class Row:
    """One line; *met* is None without a target. Figures are texts; their units are in *measure*."""

    measure: str
    product: str
    reference: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """The cells of the line."""
        verdict = "" if self.met is None else "met" if self.met else "MISSED"
        return (self.measure, self.product, self.reference, self.ratio, self.target, verdict)


def text(rows: Sequence[Row]) -> str:
    """Return *rows* as an aligned Markdown table."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    shown = []
    for line in lines:
        pairs = zip(line, widths, strict=True)
        cells = (cell.rjust(width) if 0 < at < 4 else cell.ljust(width) for at, (cell, width) in enumerate(pairs))
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown)


def spread(ratios: Sequence[float]) -> str:
    """Return the median of *ratios* with their range."""
    shown = f"{median(ratios):.2f}"
    return f"{shown} ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else shown


def figure(value: float) -> str:
    """Return *value* with three significant digits and all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
