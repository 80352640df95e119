"""The findings of a diagnosis: one line each, with a level and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from error_handler import ExitCode

Level = Literal["ok", "warning", "error"]

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis; *remedy* is empty if there is nothing to do.

    *area* is the part of the diagnosis (``mongodb``, ``model`` ...), *numbers* are for programs. The texts hold names,
    sizes and durations, never customer text or a secret.
    """

    level: Level
    sentence: str
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    area: str = ""


def ok(sentence: str, **numbers: Any) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", sentence, numbers=numbers)


def warning(sentence: str, remedy: str, **numbers: Any) -> Finding:
    """Return a finding that a run survives."""
    return Finding("warning", sentence, remedy, numbers)


def error(sentence: str, remedy: str, **numbers: Any) -> Finding:
    """Return a finding that stops a run."""
    return Finding("error", sentence, remedy, numbers)


def print_finding(console: Console, finding: Finding) -> None:
    """Print *finding*, and its remedy on a second line."""
    line = Text.assemble((f"{finding.level:<9}", STYLES[finding.level]), finding.sentence)
    console.print(line, soft_wrap=True)
    if finding.remedy:
        console.print(Text(f"         -> {finding.remedy}"), soft_wrap=True)


def count_levels(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the number of errors and warnings."""
    return {f"{level}s": sum(finding.level == level for finding in findings) for level in ("error", "warning")}


def print_totals(console: Console, findings: Sequence[Finding]) -> None:
    """Print the number of errors and warnings, the last line of a diagnosis."""
    totals = count_levels(findings)
    console.print(f"Errors: {totals['errors']}, warnings: {totals['warnings']}.", highlight=False)


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Return the exit code of a diagnosis; warnings do not change it."""
    return ExitCode.UNREACHABLE if count_levels(findings)["errors"] else ExitCode.DONE
