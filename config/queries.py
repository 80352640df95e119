"""Checks queries that an operator gives: --filter, and those of PRIORITY_RULES. Pure; storage.subset makes BSON of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from config.loading import OWN_FORM

FORBIDDEN = ("$where", "$function", "$accumulator")  # they run JavaScript on the server
RANKING = ("$text", "$near", "$nearSphere")  # MongoDB does not combine them with the order of ids
MAX_RULES = 20  # each is a query of its own
_RULE_FORM = 'must be a JSON list such as [{"query": {"channel": "phone"}, "priority": 5}]'


@dataclass(frozen=True, slots=True, repr=False)
class PriorityRule:
    """Documents that *query* (Extended JSON, checked) finds have *priority*; 0 or less is normal."""

    query: str
    priority: float

    def __repr__(self) -> str:
        """Return the rule as an operator writes it; ``doctor`` shows this."""
        return f'{{"query": {self.query}, "priority": {self.priority:g}}}'


def checked_query(query: Any) -> dict[str, Any]:
    """Return *query*, decoded JSON, if it is a usable query; raise ValueError with the reason if it is not."""
    if not isinstance(query, dict):
        raise ValueError('must be a JSON object such as {"channel": "email"}')  # noqa: TRY004 - pydantic wants it
    if not query:
        raise ValueError("selects all documents if it is empty; leave it out, or name a field")
    if used := [name for name in FORBIDDEN if _uses(query, name)]:
        raise ValueError(f"must not use {used[0]}, which runs JavaScript on the server; compare fields instead")
    if used := [name for name in RANKING if _uses(query, name)]:
        raise ValueError(f"must not use {used[0]}, which has an order of its own; use $regex or $geoWithin instead")
    return query


def _uses(value: Any, name: str) -> bool:
    """Return whether *value* has the key *name*, or with one more ``$``, which Extended JSON takes away."""
    if isinstance(value, dict):
        return not value.keys().isdisjoint((name, f"${name}")) or any(_uses(item, name) for item in value.values())
    return isinstance(value, list) and any(_uses(item, name) for item in value)


def _rules(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        entries = json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise ValueError(_RULE_FORM) from exc
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_RULES:
        raise ValueError(f"{_RULE_FORM}, with at most {MAX_RULES} entries")
    return tuple(_rule(entry) for entry in entries)


def _rule(entry: Any) -> PriorityRule:
    if not isinstance(entry, dict) or entry.keys() != {"query", "priority"}:
        raise ValueError(_RULE_FORM)
    priority = entry["priority"]
    if isinstance(priority, bool) or not isinstance(priority, int | float) or not math.isfinite(priority):
        raise ValueError(f"{_RULE_FORM}; the priority is a number")
    try:
        return PriorityRule(json.dumps(checked_query(entry["query"])), float(priority))
    except ValueError as exc:
        raise ValueError(f"the query of each rule {exc}") from exc


PriorityRules = Annotated[tuple[PriorityRule, ...] | None, OWN_FORM, BeforeValidator(_rules)]
