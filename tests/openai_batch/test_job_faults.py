"""Every fault of a batch, its files and its lines: nothing is lost, nothing is paid for twice.

Each scenario runs a job of 25 documents in shards of 10, 10 and 5 lines against the fake OpenAI and a real MongoDB.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from error_handler import ConfigurationError
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import MAX_ATTEMPTS, Job, times_with

DOCUMENTS = 25
FIRST = {"batches": [0]}
SECOND = {"batches": [1]}


@dataclass(frozen=True)
class Case:
    """One scenario: the faults of the fake, and how the lines of all shards end.

    *billed* counts the lines that were paid for; those beyond DOCUMENTS are lines whose answer was lost or unusable.
    *failed* documents fail, the others are completed. *shards* counts all shards.
    """

    faults: list[dict[str, Any]]
    ended: dict[str, int]
    billed: int = DOCUMENTS
    failed: int = 0
    shards: int = 3
    knobs: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)  # waits that the scenario needs short or long
    refused: int = 0  # batches that failed whole and were asked for again, beside those of the shards


def line(kind: str, **more: Any) -> dict[str, Any]:
    """A fault of the second line of the first batch."""
    return {"kind": kind, "when": {"indexes": [2], **FIRST}, **more}


def again(state: str = "failed", count: int = 1) -> dict[str, int]:
    """All documents completed, *count* of them at the second attempt."""
    return {"ok": DOCUMENTS, state: count}


GOOD = {"ok": DOCUMENTS}
# For files and batches that never come; elsewhere the run waits for as long as a busy machine needs.
GIVE_UP = {"files_late_s": 0.2}
# For batches that exist and are found; elsewhere the run soon creates what does not exist.
KEEP_LOOKING = {"adopt_wait_s": 30.0}
CASES = {
    # Order and content of the files
    # The lines of all other scenarios are shuffled as well, with another seed.
    "shuffled": Case([], GOOD, knobs={"shuffle": True, "seed": 5}),
    "in order": Case([], GOOD, knobs={"shuffle": False}),
    "twice the same": Case([line("duplicate")], GOOD),
    "twice, and different": Case([line("duplicate", content="another answer")], GOOD),
    "twice, once as an error": Case([line("duplicate", file="errors")], GOOD),
    "unknown ids": Case([{"kind": "unknown_ids", "when": FIRST, "count": 3}], GOOD),
    "missing in both files": Case([line("missing")], again("missing"), billed=26, shards=4),
    "no custom_id": Case([line("null_custom_id")], again("missing"), billed=26, shards=4),
    "no body": Case([line("null_body")], again(), billed=26, shards=4),
    "neither response nor error": Case([line("null_both")], again(), shards=4, billed=26),
    "no choices": Case([line("no_choices")], again(), billed=26, shards=4),
    "no usage": Case([line("no_usage")], GOOD),
    "empty answer": Case([line("content", content="")], again(), billed=26, shards=4),
    "answer of blanks": Case([line("content", content=" \n ")], again(), billed=26, shards=4),
    "junk in a line": Case([line("junk", text="{broken")], again("missing"), billed=26, shards=4),
    "byte order mark": Case([{"kind": "bom", "when": FIRST}], GOOD),
    "blank lines": Case([{"kind": "blank_lines", "when": FIRST}], GOOD),
    "junk between lines": Case([{"kind": "junk_line", "when": FIRST, "text": "<html>"}], GOOD),
    "half a last line": Case(
        [{"kind": "half_last_line", "when": FIRST, "bytes": 40}], again("missing"), billed=26, shards=4
    ),
    # Lines that were answered with an error
    **{
        f"status {status} once": Case([line("line_status", status=status)], again(), shards=4)
        for status in (408, 409, 429, 500, 503)
    },
    **{
        f"status {status}": Case(
            [line("line_status", status=status)], {"ok": DOCUMENTS - 1, "failed": 1}, DOCUMENTS - 1, failed=1
        )
        for status in (400, 404, 422)
    },
    "status 500 for ever": Case(
        [{"kind": "line_status", "when": {"text": 'text 13"'}, "status": 500}],
        {"ok": DOCUMENTS - 1, "failed": MAX_ATTEMPTS},
        DOCUMENTS - 1,
        failed=1,
        shards=5,
    ),
    "429 of a quota": Case(
        [line("line_status", status=429, code="insufficient_quota")],
        {"ok": DOCUMENTS - 1, "failed": 1},
        DOCUMENTS - 1,
        failed=1,
    ),
    "error in the output file": Case([line("line_status", status=500, file="output")], again(), shards=4),
    "time-out of a line": Case([line("line_error")], again(), shards=4),
    "refusal": Case([line("refusal", text="no")], {"ok": DOCUMENTS - 1, "failed": 1}, failed=1),
    "cut at its length": Case([line("length")], {"ok": DOCUMENTS - 1, "failed": 1}, failed=1),
    "content filter": Case([line("content_filter")], {"ok": DOCUMENTS - 1, "failed": 1}, failed=1),
    # Which files there are
    "errors only": Case(
        [{"kind": "line_status", "when": SECOND, "status": 500}], {"ok": DOCUMENTS, "failed": 10}, shards=4
    ),
    "empty texts for ids": Case([{"kind": "empty_id"}], GOOD),
    "error file of zero bytes": Case([{"kind": "empty_error_file"}], GOOD),
    "no output file": Case(
        [{"kind": "no_output_file", "when": SECOND}], again("missing", 10), DOCUMENTS + 10, shards=4, times=GIVE_UP
    ),
    "no error file": Case(
        [line("line_status", status=500), {"kind": "no_error_file", "when": FIRST}], again("missing"), shards=4
    ),
    "ids that come late": Case([{"kind": "late_output", "polls": 3}], GOOD),
    "ids that come late, without counts": Case([{"kind": "late_output", "polls": 3}, {"kind": "counts"}], GOOD),
    "output file gone": Case(
        [{"kind": "output_gone", "when": SECOND}], again("missing", 10), DOCUMENTS + 10, shards=4, times=GIVE_UP
    ),
    "no counts": Case([{"kind": "counts"}], GOOD),
    "counts of zero and late ids": Case(
        [{"kind": "counts", "value": {"total": 0, "completed": 0, "failed": 0}}, {"kind": "late_output", "polls": 3}],
        GOOD,
    ),
    # How a batch ends
    "half expired": Case([{"kind": "expire", "when": FIRST, "done": 0.5}], again("expired", 5), shards=4),
    "all expired": Case([{"kind": "expire", "when": FIRST, "done": 0.0}], again("expired", 10), shards=4),
    "half cancelled by somebody": Case(
        [{"kind": "cancel", "when": FIRST, "done": 0.5}], again("cancelled", 5), shards=4
    ),
    "all cancelled by somebody": Case(
        [{"kind": "cancel", "when": FIRST, "done": 0.0}], again("cancelled", 10), shards=4
    ),
    "unknown status": Case([{"kind": "status_value", "when": FIRST, "polls": 4}], GOOD),
    "long in finalizing": Case([{"kind": "hold", "when": FIRST, "polls": 5}], GOOD),
    "vanished": Case(
        [{"kind": "vanish", "when": FIRST, "after_polls": 1}],
        again("missing", 10),
        DOCUMENTS + 10,
        shards=4,
        times=GIVE_UP,
    ),
    "refused without lines": Case(
        [{"kind": "fail", "when": FIRST, "errors": [{"code": "model_not_found"}]}],
        {"ok": DOCUMENTS - 10, "failed": 10},
        billed=DOCUMENTS - 10,
        failed=10,
    ),
    "refused for two lines": Case(
        [
            {
                "kind": "fail",
                "when": FIRST,
                "errors": [{"code": "invalid_json_line", "line": 3}, {"code": "invalid_json_line", "line": 7}],
            }
        ],
        {"ok": DOCUMENTS - 2, "failed": 10},
        billed=DOCUMENTS - 2,
        failed=2,
        shards=4,
    ),
    "too many tokens twice": Case([{"kind": "token_limit_exceeded", "when": FIRST}], GOOD, refused=1),
    # Calls
    "create answered and lost": Case(
        [{"kind": "answer_lost", "when": {"route": "batches.create"}, "times": 2}],
        GOOD,
        knobs={"list_lag": 2},
        times=KEEP_LOOKING,
    ),
    "upload answered and lost": Case([{"kind": "answer_lost", "when": {"route": "files.create"}, "times": 2}], GOOD),
    "create answered with 408 by a gateway": Case(
        [{"kind": "answer_lost", "when": {"route": "batches.create"}, "times": 2, "how": "408"}],
        GOOD,
        times=KEEP_LOOKING,
    ),
    "create answered with a page": Case(
        [{"kind": "not_json", "when": {"route": "batches.create"}, "times": 1}],
        GOOD,
        knobs={"list_lag": 1},
        times=KEEP_LOOKING,
    ),
    "lists lag behind": Case([], GOOD, knobs={"list_lag": 3}, times=KEEP_LOOKING),
    "file not visible at once": Case(
        [{"kind": "not_found_404", "when": {"route": "batches.create"}, "times": 2}], GOOD
    ),
    "download cut in the connection": Case(
        [{"kind": "truncated", "when": {"route": "files.content"}, "times": 2}], GOOD
    ),
    "download reset": Case([{"kind": "reset_after", "when": {"route": "files.content"}, "times": 2}], GOOD),
    "download truncated without an error": Case(
        [{"kind": "cut", "when": {"route": "files.content"}, "times": 2}], GOOD
    ),
    "download slow": Case(
        [{"kind": "slow", "when": {"route": "files.content"}, "times": 1, "bytes_per_s": 20_000}], GOOD
    ),
    "download not there at once": Case(
        [{"kind": "not_found_404", "when": {"route": "files.content"}, "times": 12}], GOOD
    ),
    "batch not there at once": Case(
        [{"kind": "not_found_404", "when": {"route": "batches.retrieve"}, "times": 2}], GOOD
    ),
    **{
        f"{kind} of {route}": Case([{"kind": kind, "when": {"route": route}, "times": times}], GOOD)
        for route in (
            "files.create",
            "batches.create",
            "batches.retrieve",
            "files.content",
            "files.delete",
            "files.list",
            "batches.list",
        )
        for kind, times in (("rate_limit_429", 1), ("server_error_500", 1), ("close", 1), ("not_json", 1))
    },
    "429 with Retry-After": Case(
        [{"kind": "rate_limit_429", "when": {"route": "*"}, "times": 2, "retry_after": 1}], GOOD
    ),
}


# Of the failed calls, the usual run has those that could be paid for twice, and those whose answer the job needs.
USUAL_CALLS = {
    *("server_error_500 of batches.retrieve", "close of files.content", "close of batches.create"),
}
# Variants of other scenarios.
MORE = {
    *("all expired", "all cancelled by somebody", "status 408 once", "status 503 once", "status 404", "status 422"),
    *("lists lag behind", "in order", "twice the same", "no choices", "answer of blanks", "blank lines"),
    *("empty texts for ids", "ids that come late", "download slow", "long in finalizing"),
    *("junk between lines", "status 409 once", "status 429 once", "download reset"),
    *("twice, once as an error", "no custom_id", "no body", "no usage", "status 500 once", "time-out of a line"),
    *("error file of zero bytes", "no counts", "half cancelled by somebody", "vanished", "refused without lines"),
    *("file not visible at once", "download not there at once", "no error file", "half a last line", "empty answer"),
    *("neither response nor error", "junk in a line", "byte order mark", "errors only", "no output file"),
    *(
        "ids that come late, without counts",
        "counts of zero and late ids",
        "unknown status",
        "error in the output file",
    ),
    *("status 500 for ever", "content filter", "missing in both files", "twice, and different"),
    *("download truncated without an error", "batch not there at once", "429 with Retry-After"),
    *("create answered with a page", "unknown ids", "half expired", "refused for two lines", "output file gone"),
    *("cut at its length", "download cut in the connection", "upload answered and lost"),
    *("429 of a quota", "status 400", "too many tokens twice", "shuffled"),
}
assert CASES.keys() >= USUAL_CALLS | MORE


def is_usual(name: str) -> bool:
    is_failed_call = name.partition(" of ")[0] in ("rate_limit_429", "server_error_500", "close", "not_json")
    if is_failed_call:
        return name in USUAL_CALLS
    return name not in MORE


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if is_usual(name) else pytest.mark.thorough) for name, case in CASES.items()],
)
def test_scenario(case: Case, job: Job, openai: FakeOpenAI) -> None:
    """Each shard adds up, every document ends, and only missing answers are paid for again."""
    job.fill(DOCUMENTS)
    job.times = times_with(**case.times)
    openai.configure(faults=case.faults, **case.knobs)
    result = job.run()
    job.check(openai)
    total = job.total()
    assert total.pop("submitted") == sum(case.ended.values())
    assert dict(total) == case.ended
    assert job.statuses() == {
        name: count for name, count in (("completed", DOCUMENTS - case.failed), ("failed", case.failed)) if count
    }
    assert len(job.shards()) == case.shards
    stats = openai.stats()
    assert stats["batches_created"] == case.shards + case.refused
    assert stats["lines_billed"] == case.billed
    assert (result.total_processed, result.succeeded, result.failed) == (
        DOCUMENTS,
        DOCUMENTS - case.failed,
        case.failed,
    )
    sent = Counter(dict(job.rows("SELECT document_id, COUNT(*) FROM items GROUP BY document_id")))
    assert max(sent.values()) <= MAX_ATTEMPTS


@pytest.mark.thorough
def test_withdrawn_key_ends_run_and_new_key_resumes(job: Job, openai: FakeOpenAI) -> None:
    """The answers that were paid for are applied."""
    job.fill(DOCUMENTS)
    openai.configure(faults=[{"kind": "unauthorized_401", "when": {"route": "batches.retrieve", "from": 1}}])
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        job.run()
    made = openai.stats()["batches_created"]
    assert job.statuses() == {"in_progress": DOCUMENTS}
    openai.configure(faults=[])
    result = job.run()
    assert (result.succeeded, result.failed) == (DOCUMENTS, 0)
    assert openai.stats()["batches_created"] == made == 3
    assert openai.stats()["max_billed_per_body"] == 1
