"""The output file and the error file of a batch, written line by line in bounded memory."""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from .execution import ApiError, error_body, execute
from .faults import Fault, FaultPlan
from .knobs import Knobs

_NOT_RUN = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed because the batch was cancelled.",
}
_LINE_ERRORS = {400: ("invalid_request_error", "invalid_value"), 429: ("requests", "rate_limit_exceeded")}


@dataclass
class Built:
    """The lines that were written, and which of them were billed."""

    completed: int = 0
    failed: int = 0
    output_lines: int = 0
    error_lines: int = 0
    usage: Counter[str] = field(default_factory=Counter)
    billed_ids: list[str] = field(default_factory=list)
    billed_bodies: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """One batch to be answered: its first *run_count* lines run, the others get the error *not_run*."""

    batch: Mapping[str, Any]
    source: Path
    output: Path
    errors: Path
    run_count: int
    not_run: str
    created: int


class ResultWriter:
    """Writes both files of one job."""

    def __init__(self, job: Job, knobs: Knobs, plan: FaultPlan) -> None:
        self._job = job
        self._knobs = knobs
        self._plan = plan
        self._built = Built()
        self._file_faults = {fault["kind"]: fault for fault in job.batch["plan"]}
        self._sinks: dict[str, BinaryIO] = {}

    def write(self) -> Built:
        """Answer every line; the result is complete on disk when this returns."""
        job = self._job
        with job.source.open("rb") as source, job.output.open("wb") as output, job.errors.open("wb") as errors:
            self._sinks = {"output": output, "errors": errors}
            if "bom" in self._file_faults:
                output.write(b"\xef\xbb\xbf")
            for number, offset in self._order(source):
                source.seek(offset)
                self._answer(number, source.readline())
            self._spoil_output(output)
        return self._built

    def _order(self, source: BinaryIO) -> list[tuple[int, int]]:
        offsets = array("Q")
        position = 0
        for raw in source:
            offsets.append(position)
            position += len(raw)
        numbers = list(range(1, len(offsets) + 1))
        if self._knobs.shuffle:
            random.Random(f"{self._knobs.seed}:{self._job.batch['number']}").shuffle(numbers)
        return [(number, offsets[number - 1]) for number in numbers]

    def _answer(self, number: int, raw: bytes) -> None:
        job, request = self._job, orjson.loads(raw)
        custom_id = request["custom_id"]
        digest = hashlib.sha256(f"{job.batch['id']}:{custom_id}".encode()).hexdigest()
        line: dict[str, Any] = {"id": f"batch_req_{digest[:24]}", "custom_id": custom_id}
        if number > job.run_count:
            self._built.failed += 1
            error = {"code": job.not_run, "message": _NOT_RUN[job.not_run]}
            self._put("errors", line | {"response": None, "error": error})
            return
        fault = None
        if self._plan.has_line_faults:
            batch = job.batch
            text = raw.decode(errors="replace")
            fault = self._plan.for_line(batch["number"], batch["metadata"] or {}, number, custom_id, text)
        try:
            body = execute(request["url"], request["body"], digest[24:48], job.created, self._knobs)
            status = 200
        except ApiError as exc:
            body, status = exc.body, exc.status
        response = {"status_code": status, "request_id": f"req_{digest[32:]}", "body": body}
        line |= {"response": response, "error": None}
        if fault is None:
            self._finish(line, request["body"])
        else:
            self._finish_struck(line, request["body"], fault)

    def _finish(self, line: dict[str, Any], body: Mapping[str, Any]) -> None:
        """Bill and write an ordinary line."""
        response = line["response"]
        if response["status_code"] != 200:
            self._built.failed += 1
            self._put("errors", line)
            return
        self._bill(line, body)
        self._put("output", line)

    def _bill(self, line: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        built = self._built
        usage = line["response"]["body"].get("usage") or {}
        built.completed += 1
        built.usage["input_tokens"] += usage.get("prompt_tokens", 0)
        built.usage["output_tokens"] += usage.get("completion_tokens", 0)
        built.usage["total_tokens"] += usage.get("total_tokens", 0)
        built.billed_ids.append(line["custom_id"])
        built.billed_bodies.append(body_sha256(body))

    def _finish_struck(self, line: dict[str, Any], body: Mapping[str, Any], fault: Fault) -> None:
        kind, params = fault.kind, fault.params
        if kind in ("line_status", "line_error"):
            self._built.failed += 1
            fail = _with_status if kind == "line_status" else _with_error
            self._put(params.get("file", "errors"), fail(line, params))
            return
        if line["response"]["status_code"] == 200:
            self._bill(line, body)
        if kind == "missing":
            return
        if kind == "duplicate":
            self._put("output", line)
            self._put(params.get("file", "output"), _changed(line, params))
        elif kind == "junk":
            self._write("output", str(params.get("text", "{not json")).encode() + b"\n")
        else:
            self._put("output", _SPOILERS[kind](line, params))

    def _spoil_output(self, output: BinaryIO) -> None:
        faults = self._file_faults
        for place in range(int(faults.get("unknown_ids", {}).get("count", 1)) if "unknown_ids" in faults else 0):
            response = {"status_code": 200, "request_id": "req_unknown", "body": {}}
            self._put("output", {"id": f"batch_req_unknown_{place}", "custom_id": f"unknown-{place}", "response": response,
                                 "error": None})  # fmt: skip
        if "blank_lines" in faults:
            self._write("output", b"\n\r\n  \n")
        if "junk_line" in faults:
            self._write("output", str(faults["junk_line"].get("text", "<html>oops</html>")).encode() + b"\n")
        if "half_last_line" in faults:
            output.flush()
            output.truncate(max(0, output.tell() - int(faults["half_last_line"].get("bytes", 40))))

    def _put(self, sink: str, line: Mapping[str, Any]) -> None:
        self._write(sink, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def _write(self, sink: str, raw: bytes) -> None:
        self._sinks[sink].write(raw)
        if sink == "output":
            self._built.output_lines += 1
        else:
            self._built.error_lines += 1


def body_sha256(body: Mapping[str, Any]) -> str:
    """Key of a request body in ``FakeOpenAI.billed_bodies``: keys sorted, no spaces."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _with_status(line: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    status = int(params.get("status", 500))
    kind, code = _LINE_ERRORS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    message = params.get("message", f"The fake answers this request with {status}.")
    body = params.get("body") or error_body(message, params.get("code", code), None, kind)
    return dict(line) | {"response": {**line["response"], "status_code": status, "body": body}}


def _with_error(line: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    code = params.get("code", "request_timeout")
    message = params.get("message", "The request timed out.")
    return dict(line) | {"response": None, "error": {"code": code, "message": message}}


def _changed(line: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The line once more; with ``content`` another answer, as if it had been run twice."""
    return dict(line) if "content" not in params else _with_content(line, params)


def _with_choice(line: Mapping[str, Any], finish: str | None, **message: Any) -> dict[str, Any]:
    response = dict(line["response"])
    body = dict(response["body"])
    if body.get("choices"):
        choice = dict(body["choices"][0])
        choice["message"] = {**choice["message"], **message}
        choice["finish_reason"] = finish or choice["finish_reason"]
        body["choices"] = [choice]
    return dict(line) | {"response": response | {"body": body}}


def _with_content(line: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    return _with_choice(line, params.get("finish_reason"), content=params.get("content", ""))


def _cut(line: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    choices = line["response"]["body"].get("choices") or [{"message": {"content": ""}}]
    content = choices[0]["message"]["content"]
    return _with_choice(line, "length", content=content[: len(content) // 2])


def _without(line: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    response = dict(line["response"])
    return dict(line) | {"response": response | {"body": dict(response["body"]) | {key: value}}}


_SPOILERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "null_custom_id": lambda line, params: dict(line) | {"custom_id": None},
    "null_body": lambda line, params: dict(line) | {"response": {**line["response"], "body": None}},
    "null_both": lambda line, params: dict(line) | {"response": None, "error": None},
    "content": _with_content,
    "refusal": lambda line, params: _with_choice(
        line, "stop", content=None, refusal=params.get("text", "I'm sorry, I can't assist with that request.")
    ),
    "length": _cut,
    "content_filter": lambda line, params: _with_choice(line, "content_filter", content=None),
    "no_choices": lambda line, params: _without(line, "choices", []),
    "no_usage": lambda line, params: _without(line, "usage", None),
}
