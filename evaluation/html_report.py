"""Renders a report as one HTML page without scripts and without requests to other servers."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from evaluation.report import (
    METHODS,
    RANDOM_GOLD,
    Report,
    change_text,
    decimal_text,
    interval_text,
    p_text,
    percent_text,
)
from evaluation.text_report import problem_text
from evaluation.values import PROBLEMS, shown

TEMPLATE = Path(__file__).with_name("report.html.j2")


def render_html(report: Report) -> str:
    """Return the page of *report*. Labels and ids are escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "interval": interval_text,
        "percent": percent_text,
        "decimal": decimal_text,
        "change": change_text,
        "p": p_text,
        "labels": shown,
        "problem": problem_text,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, methods=METHODS, problem_names=PROBLEMS, random_gold=RANDOM_GOLD)
