"""Which part of the source documents a command reads: a query of the operator, and a span of time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime

from config.queries import checked_query
from error_handler import ConfigurationError
from storage import extended_json
from storage.extended_json import Document


def parsed_query(text: str, name: str) -> Document:
    """Return the query in *text*, Extended JSON; *name* is the flag or the setting that it comes from.

    Raise ConfigurationError if it is no query, or runs JavaScript.
    """
    try:
        checked_query(json.loads(text))
        query: Document = extended_json.loads(text)
    except RecursionError as exc:
        raise ConfigurationError(f"{name} is nested too deeply; write a flatter query.") from exc
    except json.JSONDecodeError as exc:
        example = '\'{"channel": "email"}\''
        raise ConfigurationError(
            f"{name} is not JSON (character {exc.pos + 1}); put it in single quotes: {example}."
        ) from exc
    except ValueError as exc:
        wrong = str(exc) if str(exc).startswith(("must", "selects")) else "has a value that is not Extended JSON"
        raise ConfigurationError(f"{name} {wrong}.") from exc
    return query


@dataclass(frozen=True, slots=True)
class Subset:
    """Conditions on source documents; a document must meet all of them.

    *query* is that of ``--filter``, {} for none. *since* and *until* (aware; the latter is exclusive; None for no limit) limit
    the time in *time_field*: a date, the time of an ObjectId, or a text that MongoDB can read as a date.
    """

    query: Document = field(default_factory=dict)
    since: datetime | None = None
    until: datetime | None = None
    time_field: str = "created_at"

    @property
    def condition(self) -> Document:
        """The query for all conditions; {} if there are none."""
        parts = [self.query] if self.query else []
        limits = {"$gte": self.since, "$lt": self.until}
        if span := {name: at for name, at in limits.items() if at is not None}:
            path = self.time_field
            read = {"$convert": {"input": f"${path}", "to": "date", "onError": None, "onNull": None}}
            # Null is less than each date, so a text that is no date needs a condition of its own.
            compared = [{name: [read, {"$literal": at}]} for name, at in span.items()]
            other = {path: {"$type": ["string", "objectId"]}, "$expr": {"$and": [{"$gt": [read, None]}, *compared]}}
            parts.append({"$or": [{path: span}, other]})
        return {"$and": parts} if parts else {}

    @property
    def name(self) -> str | None:
        """A hash of the conditions, which tells subsets apart and shows no value; None if there are none."""
        condition = self.condition
        return hashlib.sha256(extended_json.dumps(condition)).hexdigest()[:16] if condition else None


ALL = Subset()
