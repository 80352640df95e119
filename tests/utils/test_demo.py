"""The demonstration shows what it promises, with nothing installed but the packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aggregator import aggregate_conversation
from error_handler import LLMReplyError, Reason
from tests.environment import clean_environment
from tests.forked_process import run_forked
from utils.demo_batch_processor import DOCUMENTS, SCRIPT, scripted_model

ROOT = Path(__file__).parents[2]
BY_ID = {document["_id"]: document for document in DOCUMENTS}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT, env=clean_environment() | {"TMPDIR": str(folder)},
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["utils/demo_batch_processor.py"], marks=pytest.mark.thorough),
        ["-m", "utils.demo_batch_processor"],
    ],
    ids=["as a file", "as a module"],
)
def test_every_way_a_document_can_end_is_shown(command: list[str], tmp_path: Path) -> None:
    is_module = command[0] == "-m"
    done = (
        run_forked(command, clean_environment() | {"TMPDIR": str(tmp_path)}, ROOT)
        if is_module
        else run(command, tmp_path)
    )
    assert (done.returncode, done.stderr) == (0, "")
    counts = "documents_processed 5, successful 3, failed 1, skipped 1, retried 3, in_retry_queue 0, in_quarantine 1"
    assert f"run: {counts}\n" in done.stdout
    assert "demo-1  Order Status | Shipping/Delivery | Negative" in done.stdout
    assert "demo-3  failed (not_json" in done.stdout
    assert "demo-4  skipped (skipped_no_customer" in done.stdout
    assert "demo-5  processed: True" in done.stdout
    assert "quarantine/batch_001_quarantine.json" in done.stdout
    assert "documents_processed 0, results 3" in done.stdout
    assert list(tmp_path.iterdir()) == [], "the batch files were removed"


@pytest.mark.thorough
def test_the_repaired_answer_took_two_calls(tmp_path: Path) -> None:
    lines = run(["utils/demo_batch_processor.py"], tmp_path).stdout.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("   demo-2  Refund Request"))
    assert lines[place + 1].endswith("(model asked 2x)")


@pytest.mark.parametrize(
    ("document_id", "intent", "calls"), [("demo-1", "Order Status", 1), ("demo-2", "Refund Request", 2)]
)
async def test_scripted_replies_go_through_the_real_parser(document_id: str, intent: str, calls: int) -> None:
    outcome = await scripted_model()(aggregate_conversation(BY_ID[document_id]), 0)
    assert outcome.classification.intent == intent
    assert outcome.attempts == calls


async def test_a_reply_that_is_no_answer_fails_as_in_a_real_run() -> None:
    with pytest.raises(LLMReplyError) as caught:
        await scripted_model()(aggregate_conversation(BY_ID["demo-3"]), 0)
    assert caught.value.reason is Reason.NOT_JSON


def test_the_script_has_a_part_for_each_document_that_reaches_the_model() -> None:
    asked = [document for document in DOCUMENTS if document["_id"] != "demo-4"]
    starts = [aggregate_conversation(document).customer_texts[0] for document in asked]
    assert all(any(text.startswith(words) for words in SCRIPT) for text in starts)
    assert len(starts) == len(SCRIPT)


@pytest.mark.thorough
def test_closed_stdout_is_not_an_error(tmp_path: Path) -> None:
    """As in ``demo_batch_processor.py | head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-u", "utils/demo_batch_processor.py"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment() | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
