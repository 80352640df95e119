"""Batch objects and the lines of their files, as data. Pure.

Facts: OpenAI API reference (batches, files) and the traps seen in the wild that docs/openai-batch.md names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from openai_batch.ledger import ItemState

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})

TOKEN_LIMIT = "token_limit_exceeded"  # noqa: S105 - a code of the API
# Codes of lines that were not run, and how they ended.
_NOT_RUN = {"batch_expired": ItemState.EXPIRED, "batch_cancelled": ItemState.CANCELLED}
_RETRYABLE_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
# A 429 that more attempts cannot help.
_FINAL_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch as the API tells it. *status* is kept as it comes: unknown ones are waited for like running ones.

    *codes* are those of a batch that failed as a whole, *bad_lines* the lines of its file (from 1) that it names as
    the cause; *output_file_id* and *error_file_id* are None where the
    API says null or nothing. Counts are None where it does not count.
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
        """Whether nothing more will run; its files may still be on their way."""
        return self.status in ENDED

    @property
    def is_unknown(self) -> bool:
        """Whether the API has a status that did not exist when this was written."""
        return self.status not in ENDED and self.status not in RUNNING

    @property
    def is_over_token_limit(self) -> bool:
        """Whether it was refused because too much is enqueued: a matter of waiting, nothing ran."""
        return self.status == "failed" and TOKEN_LIMIT in self.codes

    @property
    def lacks_files(self) -> bool:
        """Whether it ended with lines run and says no file yet: the API fills them in a moment later."""
        has_none = self.output_file_id is None and self.error_file_id is None
        if self.status == "completed" and has_none:
            return True  # each line is in one of them, whatever the counts say
        answered = (self.completed or 0) > 0 and self.output_file_id is None
        ran = (self.failed or 0) > 0 or self.total is None
        return self.status in ("completed", "expired", "cancelled") and (answered or (has_none and ran))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an output or error file.

    *state* is OK, FAILED, EXPIRED or CANCELLED. *content* is the model's text where it is OK. *code* and
    *message* say what went wrong; *message* is the API's own sentence and may quote the request: never logged.
    """

    custom_id: str
    state: ItemState
    content: str | None = None
    code: str | None = None
    message: str | None = None
    is_retryable: bool = False
    model: str | None = None
    prompt_tokens: int | None = None
    reply_tokens: int | None = None


def parse_batch(fields: Mapping[str, Any]) -> BatchState:
    """Return the state in *fields*, the batch object as plain values; nulls and missing fields are taken as they are."""
    errors = _mapping(fields.get("errors")).get("data")
    problems = [_mapping(entry) for entry in errors] if isinstance(errors, list) else []
    counts = _mapping(fields.get("request_counts"))
    metadata = _mapping(fields.get("metadata"))
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
        metadata={str(key): str(value) for key, value in metadata.items()},
        bad_lines=tuple(line for entry in problems if (line := _count(entry.get("line")))),
    )


def is_ours(state: BatchState, metadata: Mapping[str, str]) -> bool:
    """Whether *state* is the batch that was asked for with *metadata*."""
    return all(state.metadata.get(key) == value for key, value in metadata.items())


def parse_line(raw: bytes) -> Line | None:
    """Return what a line of an output or error file says; None where it is no such line."""
    fields = loaded(raw.removeprefix(b"\xef\xbb\xbf"))
    custom_id = _text(fields.get("custom_id")) if isinstance(fields, dict) else None
    if custom_id is None:
        return None
    response, error = fields.get("response"), _mapping(fields.get("error"))
    if not isinstance(response, dict):
        code = _text(error.get("code")) or "no_response"
        state = _NOT_RUN.get(code, ItemState.FAILED)
        # It was not run, so it was not paid for either.
        return Line(custom_id, state, code=code, message=_text(error.get("message")), is_retryable=True)
    body = _mapping(response.get("body"))
    status = _count(response.get("status_code"))
    if status is None or not 200 <= status < 300:
        problem = _mapping(body.get("error")) or error
        code = _text(problem.get("code")) or _text(problem.get("type")) or f"http_{status}"
        retryable = (status is None or status in _RETRYABLE_STATUSES) and code not in _FINAL_CODES
        return Line(
            custom_id, ItemState.FAILED, code=code, message=_text(problem.get("message")), is_retryable=retryable
        )
    return _answer(custom_id, body)


def loaded(raw: bytes) -> Any:
    """Return the JSON value of *raw*, None where it is none."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    try:  # half an emoji, which models do write, is a JSON text for this parser and none for the fast one
        return json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _answer(custom_id: str, body: Mapping[str, Any]) -> Line:
    choices = body.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    message, usage = _mapping(choice.get("message")), _mapping(body.get("usage"))
    content, finish = _text(message.get("content")), choice.get("finish_reason")
    model, tokens = (
        _text(body.get("model")),
        (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))),
    )
    if message.get("refusal"):
        return Line(custom_id, ItemState.FAILED, None, "refusal", None, False, model, *tokens)
    if finish == "content_filter":
        return Line(custom_id, ItemState.FAILED, None, "content_filter", None, False, model, *tokens)
    if finish == "length":
        return Line(custom_id, ItemState.FAILED, None, "cut_off", None, False, model, *tokens)
    if content is None or not content.strip():
        return Line(custom_id, ItemState.FAILED, None, "empty", None, True, model, *tokens)
    return Line(custom_id, ItemState.OK, content, None, None, False, model, *tokens)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    """Return a text that can be stored: half a surrogate pair becomes a question mark."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
