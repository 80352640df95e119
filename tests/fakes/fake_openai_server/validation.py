"""The checks of a batch's input file before anything runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from .answers import embedding_inputs, prompt_tokens
from .knobs import Knobs

MAX_REPORTED_ERRORS = 100


@dataclass
class Verdict:
    """Outcome of the validation; *errors* empty means the batch may run."""

    total: int = 0
    tokens: int = 0
    inputs: int = 0
    model: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        """One entry of ``errors.data``; only the first `MAX_REPORTED_ERRORS` are kept."""
        if len(self.errors) < MAX_REPORTED_ERRORS:
            self.errors.append({"code": code, "line": line, "message": message, "param": param})


def validate_file(path: Path, purpose: str, endpoint: str, knobs: Knobs, custom_ids: list[str]) -> Verdict:
    """Read the file line by line; *custom_ids* gets those of all lines, in their order."""
    verdict = Verdict()
    size = path.stat().st_size if path.exists() else 0
    if purpose != "batch":
        verdict.add(
            "invalid_request", f"The file has the purpose '{purpose}'; expected 'batch'.", None, "input_file_id"
        )
    elif size == 0:
        verdict.add(
            "empty_file", "The input file is empty. Please ensure that the batch contains at least one request."
        )
    elif size > knobs.max_file_bytes:
        limit = knobs.max_file_bytes
        verdict.add("invalid_request", f"The input file has {size} bytes; the limit of a batch is {limit} bytes.")
    if verdict.errors:
        return verdict
    check = _LineCheck(endpoint, knobs, custom_ids, verdict)
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            verdict.total = number
            if number <= knobs.max_lines:  # the others are only counted
                check.line(raw, number)
    if verdict.total > knobs.max_lines:
        message = f"The batch has {verdict.total} requests, more than the limit of {knobs.max_lines}."
        verdict.errors = []
        verdict.add("too_many_tasks", message)
    elif verdict.inputs > knobs.max_embedding_inputs:
        limit = knobs.max_embedding_inputs
        verdict.add(
            "too_many_tasks", f"The batch has {verdict.inputs} embedding inputs, more than the limit of {limit}."
        )
    return verdict


class _LineCheck:
    """The conditions for each line, which include the lines before it."""

    def __init__(self, endpoint: str, knobs: Knobs, custom_ids: list[str], verdict: Verdict) -> None:
        self._endpoint = endpoint
        self._knobs = knobs
        self._custom_ids = custom_ids
        self._seen: set[str] = set()
        self._verdict = verdict

    def line(self, raw: bytes, number: int) -> None:
        """Check line *number*, from 1."""
        try:
            line = orjson.loads(raw)
        except orjson.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            self._verdict.add("invalid_json_line", "This line is not parseable as valid JSON.", number)
            return
        custom_id = line.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            self._verdict.add(
                "missing_required_parameter", "Missing required parameter: 'custom_id'.", number, "custom_id"
            )
        elif custom_id in self._seen:
            message = (
                f"The custom_id '{custom_id}' for this request is a duplicate of another request."
                " The custom_id parameter must be unique for each request in a batch."
            )
            self._verdict.add("duplicate_custom_id", message, number, "custom_id")
        else:
            self._seen.add(custom_id)
            self._custom_ids.append(custom_id)
        if line.get("method") != "POST":
            self._verdict.add("invalid_method", "The method must be 'POST'.", number, "method")
        if line.get("url") != self._endpoint:
            message = f"The URL provided for this request does not match the batch endpoint '{self._endpoint}'."
            self._verdict.add("url_mismatch", message, number, "url")
        self._body(line.get("body"), number)

    def _body(self, body: Any, number: int) -> None:
        if not isinstance(body, dict):
            self._verdict.add("missing_required_parameter", "Missing required parameter: 'body'.", number, "body")
            return
        model = body.get("model")
        if not isinstance(model, str):
            self._verdict.add(
                "missing_required_parameter", "Missing required parameter: 'body.model'.", number, "body.model"
            )
        elif self._verdict.model is None:
            self._verdict.model = model
            if self._knobs.models is not None and model not in self._knobs.models:
                message = f"The provided model '{model}' is not supported by the Batch API."
                self._verdict.add("model_not_found", message, number, "body.model")
        elif model != self._verdict.model:
            message = (
                f"The model '{model}' of this request differs from '{self._verdict.model}' of the others in this batch."
            )
            self._verdict.add("model_mismatch", message, number, "body.model")
        try:
            self._verdict.tokens += prompt_tokens(body)
            if "input" in body:
                self._verdict.inputs += len(embedding_inputs(body["input"]))
        except ValueError:
            pass  # the line fails by itself when it runs
