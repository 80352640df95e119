"""Batch objects and the lines of their files, as data.

Sources: the OpenAI API reference (batches, files) and the deviations that docs/openai-batch.md names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from openai_batch.ledger import ItemState

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
KNOWN = ENDED | {"validating", "in_progress", "finalizing", "cancelling"}

TOKEN_LIMIT = "token_limit_exceeded"  # noqa: S105 - a code of the API
# Error codes of lines that never ran, and the state they end in.
_NOT_RUN = {"batch_expired": ItemState.EXPIRED, "batch_cancelled": ItemState.CANCELLED}
_RETRYABLE_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
# Codes of a 429 that no retry can help.
_FINAL_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch as the API reports it.

    An unknown *status* counts as running. *codes* are the error codes of a batch that failed as a whole, *bad_lines*
    the line numbers (from 1) of its file that caused it. File ids and counts are None if the API reports none.
    """

    batch_id: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    codes: tuple[str, ...]
    message: str | None
    total: int | None
    completed: int | None
    failed: int | None
    metadata: Mapping[str, str]
    bad_lines: tuple[int, ...] = ()

    @property
    def has_ended(self) -> bool:
        """True if nothing more will run; its files may still be missing."""
        return self.status in ENDED

    @property
    def is_over_token_limit(self) -> bool:
        """True if it was refused because too many tokens are enqueued; nothing ran."""
        return self.status == "failed" and TOKEN_LIMIT in self.codes

    @property
    def lacks_files(self) -> bool:
        """True if it ended with lines run and reports no file yet: the API fills the ids in later."""
        has_none = self.output_file_id is None and self.error_file_id is None
        if self.status == "completed" and has_none:
            return True  # each line is in one of the two files; the counts may be wrong
        answered = (self.completed or 0) > 0 and self.output_file_id is None
        ran = (self.failed or 0) > 0 or self.total is None
        return self.status in ("completed", "expired", "cancelled") and (answered or (has_none and ran))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an output or error file.

    *state* is OK, FAILED, EXPIRED or CANCELLED. *content* is the model's text if it is OK, *code* the reason
    otherwise. *message* is the API's own text for FAILED; it may quote the request, so it is never shown as it is.
    """

    custom_id: str
    state: ItemState
    content: str | None = None
    code: str | None = None
    is_retryable: bool = False
    model: str | None = None
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    message: str | None = field(default=None, repr=False)


def parse_batch(fields: Mapping[str, Any]) -> BatchState:
    """Return the state of the batch object *fields*; nulls, missing fields and other types are tolerated."""
    errors = _mapping(fields.get("errors")).get("data")
    problems = [_mapping(entry) for entry in errors] if isinstance(errors, list) else []
    counts = _mapping(fields.get("request_counts"))
    return BatchState(
        batch_id=str(fields.get("id")),
        status=str(fields.get("status")),
        output_file_id=_text(fields.get("output_file_id")),
        error_file_id=_text(fields.get("error_file_id")),
        codes=tuple(code for entry in problems if (code := _text(entry.get("code"))) is not None),
        message=next((text for entry in problems if (text := _text(entry.get("message"))) is not None), None),
        total=_count(counts.get("total")),
        completed=_count(counts.get("completed")),
        failed=_count(counts.get("failed")),
        metadata={str(key): str(value) for key, value in _mapping(fields.get("metadata")).items()},
        bad_lines=tuple(line for entry in problems if (line := _count(entry.get("line")))),
    )


def parse_line(raw: bytes) -> Line | None:
    """Return the line *raw* of an output or error file; None if it is not one."""
    fields = _mapping(load_json(raw.removeprefix(b"\xef\xbb\xbf")))
    custom_id = _text(fields.get("custom_id"))
    if custom_id is None:
        return None
    response, error = fields.get("response"), _mapping(fields.get("error"))
    if not isinstance(response, dict):
        code = _text(error.get("code")) or "no_response"
        # It never ran, so it was not billed either.
        message = _text(error.get("message"))
        return Line(custom_id, _NOT_RUN.get(code, ItemState.FAILED), code=code, is_retryable=True, message=message)
    body = _mapping(response.get("body"))
    status = _count(response.get("status_code"))
    if status is None or not 200 <= status < 300:
        problem = _mapping(body.get("error")) or error
        code = _text(problem.get("code")) or _text(problem.get("type")) or f"http_{status}"
        is_retryable = (status is None or status in _RETRYABLE_STATUSES) and code not in _FINAL_CODES
        message = _text(problem.get("message"))
        return Line(custom_id, ItemState.FAILED, code=code, is_retryable=is_retryable, message=message)
    return _answer(custom_id, body)


def request_texts(path: Path) -> Iterator[str]:
    """Yield every text of the requests in file *path*; nothing if it does not exist."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for raw in file:
            yield from texts_of(_mapping(load_json(raw)).get("body"))


def load_json(raw: bytes) -> Any:
    """Return the JSON value of *raw*; None if it is not JSON."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    try:  # models write lone surrogates, which orjson refuses and json accepts
        return json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _answer(custom_id: str, body: Mapping[str, Any]) -> Line:
    choices = body.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    message, usage = _mapping(choice.get("message")), _mapping(body.get("usage"))
    content, finish = _text(message.get("content")), choice.get("finish_reason")
    code = {"content_filter": "content_filter", "length": "cut_off"}.get(str(finish))
    if message.get("refusal"):
        code = "refusal"
    elif code is None and (content is None or not content.strip()):
        code = "empty"
    return Line(
        custom_id,
        ItemState.OK if code is None else ItemState.FAILED,
        content if code is None else None,
        code,
        is_retryable=code == "empty",
        model=_text(body.get("model")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        reply_tokens=_count(usage.get("completion_tokens")),
    )


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text in *value*, and its long numbers, which may be those of orders or customers."""
    if isinstance(value, str) or (isinstance(value, int | float) and len(str(value)) > 3):
        yield str(value)
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from texts_of(entry)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    """Return *value* if it is a text, with lone surrogates replaced by question marks so that it can be stored."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
