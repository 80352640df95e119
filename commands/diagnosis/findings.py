"""What a diagnosis says: one finding per line, with a level and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

Level = Literal["ok", "warning", "error"]

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis; *remedy* is empty where there is nothing to do.

    *area* is what it is about (``mongodb``, ``model`` ...), *numbers* what programs read instead of the sentence. Both
    texts hold names, sizes and durations, never a document or a secret.
    """

    level: Level
    sentence: str
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    area: str = ""


def counted(number: int, noun: str) -> str:
    """Return *number* with *noun* in singular or plural: ``1 file``, ``2,000 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_finding(console: Console, finding: Finding) -> None:
    """Print *finding*, and its remedy on a line of its own."""
    line = Text.assemble((f"{finding.level:<9}", STYLES[finding.level]), finding.sentence)
    console.print(line, soft_wrap=True)
    if finding.remedy:
        console.print(Text(f"         -> {finding.remedy}"), soft_wrap=True)
