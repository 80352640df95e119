"""``cli.py openai-batch``: every action against the fake OpenAI and a real MongoDB; processes only where signals go."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import orjson
import pytest
from rich.console import Console

from openai_batch.actions import LINE_EVERY_S, JobProgress
from tests.fakes.fake_openai import FakeOpenAI
from tests.forked_process import ForkedProcess
from tests.openai_batch.openai_job import END_S, ROOT, Job
from tests.terminal import Terminal
from tests.worker.site import until

ELSEWHERE = "http://192.0.2.1:9/v1"  # a documentation address: nobody is there, and nothing may ask


@pytest.fixture(autouse=True)
def documents(job: Job) -> None:
    job.fill(25)


def snapshot(job: Job) -> list[dict[str, Any]]:
    return list(job.documents.find().sort("_id"))


def uploaded_lines(fake: FakeOpenAI) -> list[bytes]:
    """Every line that reached the fake in a file for batches; such files must still be there."""
    files = [file for file in fake.files() if file["purpose"] == "batch"]
    return [line for file in files for line in fake.path_of(file["id"]).read_bytes().splitlines()]


@pytest.mark.thorough
def test_steps_run_one_by_one(job: Job, openai: FakeOpenAI) -> None:
    """submit, status and poll resume from the ledger, also after a restart of OpenAI."""
    submitted = job.cli("submit", "--json")
    assert submitted.code == 0, submitted.err
    assert [batch["submitted"] for batch in submitted.json["batches"]] == [10, 10, 5]
    assert job.statuses() == {"in_progress": 25}
    openai.restart()
    seen = len(openai.requests())
    status = job.cli("status", "--json")
    assert [batch["state"] for batch in status.json["batches"]] == ["created"] * 3
    assert len(openai.requests()) == seen, "status asked somebody"
    polled = job.cli("poll")
    assert polled.code == 0, polled.err
    assert "Open batches: 3." in polled.out
    last = job.cli("poll", "--json")
    assert last.code == 0, last.err
    assert last.json["succeeded"] == last.json["total_processed"] == 25
    assert job.statuses() == {"completed": 25}
    assert openai.stats()["batches_created"] == 3
    again = job.cli("run", "--json")
    assert (again.code, again.json["total_processed"]) == (0, 0)
    assert openai.stats()["batches_created"] == 3


def test_status_without_ledger_creates_none(job: Job, openai: FakeOpenAI) -> None:
    """It reports that nothing was sent."""
    assert "sent nothing yet" in job.cli("status").out
    assert job.cli("status", "--json").json == {"batches": []}
    assert not (job.folder / "state").exists()
    assert openai.requests() == []


@pytest.mark.slow
def test_run_is_exclusive_and_resumes_after_sigterm(job: Job, openai: FakeOpenAI) -> None:
    """status works during a run; SIGTERM exits with 130; the next run pays for nothing twice."""
    openai.configure(polls_until_done=0)
    with job.started("run") as running:
        openai.wait_for("requests:batches.retrieve", at_least=6)
        second = job.cli("run")
        assert second.code == 5, second.err
        status = job.cli("status", "--json")
        assert status.code == 0, status.err
        assert {batch["state"] for batch in status.json["batches"]} == {"created"}
        ended = running.stop()
    assert ended.code == 130, ended.err
    assert "run the same command again to resume" in ended.err
    openai.advance(4000)
    again = job.cli("run", "--json")
    assert again.code == 0, again.err
    assert again.json["succeeded"] == 25
    stats = openai.stats()
    assert (stats["batches_created"], stats["max_billed_per_body"], stats["lines_billed"]) == (3, 1, 25)


def test_sigterm_before_mongodb_answers_ends_at_once(job: Job) -> None:
    """There is nothing to finish yet."""
    with FakeOpenAI() as silent:
        # A server that accepts connections and sends nothing acts as a MongoDB that hangs.
        silent.pause()
        # The driver's own time-out of a connection is 20 s, and closing must not wait for it.
        uri = f"mongodb://127.0.0.1:{silent.port}/"
        with job.started("run", MONGODB_URI=uri, MONGODB_TIMEOUT_MS="60000") as running:
            until((job.folder / "state/.lock").exists)
            begun_s = time.monotonic()
            ended = running.stop()
    assert ended.code == 130, ended.err
    assert time.monotonic() - begun_s < 15


@pytest.mark.thorough
def test_failed_documents_are_exit_code_1(job: Job, openai: FakeOpenAI) -> None:
    """The run completes all other documents."""
    openai.configure(
        faults=[
            {"kind": "line_status", "status": 400, "code": "invalid_request", "when": {"text": '"Summarise: text 3"'}}
        ]
    )
    ended = job.cli("run", "--json")
    assert ended.code == 1, ended.err
    assert (ended.json["succeeded"], ended.json["failed"]) == (24, 1)
    assert job.statuses() == {"completed": 24, "failed": 1}


@pytest.mark.slow
def test_cancel_keeps_answers_and_returns_the_rest(job: Job, openai: FakeOpenAI) -> None:
    """Answers that were paid for are applied; a later run sends the other documents only."""
    openai.configure(polls_until_done=0, faults=[{"kind": "cancel", "done": 0.4, "when": {"batches": []}}])
    job.cli("submit")
    openai.advance(300)  # half of run_s
    cancelled = job.cli("cancel", "--json")
    assert cancelled.code == 0, cancelled.err
    openai.advance(1000)
    polled = job.cli("poll", "--json")
    assert polled.code == 0, polled.err
    for batch in polled.json["batches"]:
        ended = sum(batch[state] for state in ("ok", "failed", "expired", "cancelled", "missing"))
        assert (batch["status"], ended) == ("cancelled", batch["submitted"])
    kept = polled.json["succeeded"]
    assert 0 < kept < 25
    assert job.statuses() == {"completed": kept, "pending": 25 - kept}
    assert job.cli("submit", MAX_RETRIES="1").code == 0
    job.cli("cancel", MAX_RETRIES="1")
    openai.advance(1000)
    polled = job.cli("poll", MAX_RETRIES="1")
    assert (polled.code, job.statuses()) == (0, {"completed": kept, "pending": 25 - kept}), (
        "a cancelled batch was an attempt"
    )
    openai.configure(polls_until_done=2)
    assert job.cli("run", MAX_RETRIES="1").code == 0
    assert job.statuses() == {"completed": 25}
    assert openai.stats()["max_billed_per_body"] == 1


def test_dry_run_shows_the_exact_bodies(job: Job, openai: FakeOpenAI) -> None:
    """Without a key, a request or any change."""
    job.documents.update_one({"_id": 1}, {"$set": {"text": 'Ünïcode "quoted"\n<b>€</b>'}})
    job.documents.update_one({"_id": 20}, {"$unset": {"text": ""}})
    before = snapshot(job)
    made = job.cli("run", "--dry-run", "--json", OPENAI_API_KEY="", OPENAI_BASE_URL=ELSEWHERE)
    assert made.code == 0, made.err
    assert openai.requests() == []
    assert snapshot(job) == before
    assert not (job.folder / "state").exists()
    shown = made.json
    assert (shown["documents"], shown["refused"], len(shown["examples"])) == (24, 1, 3)
    assert shown["most_reply_tokens"] == 24 * 500
    assert shown["most_usd"] > 0
    submitted = job.cli("submit")
    assert submitted.code == 1, submitted.err  # of the document without text
    lines = uploaded_lines(openai)
    bodies = {json.loads(line)["body"]["messages"][-1]["content"]: line for line in lines}
    for example in shown["examples"]:
        line = bodies[example["body"]["messages"][-1]["content"]]
        assert b'"body":' + orjson.dumps(example["body"]) + b"}" in line
    assert abs(shown["bytes"] - sum(len(line) + 1 for line in lines)) < 4 * len(lines)


def test_dry_run_prints_bodies_price_address_and_refusals(job: Job, openai: FakeOpenAI) -> None:
    """Without --json."""
    job.documents.update_one({"_id": 1}, {"$unset": {"text": ""}})
    made = job.cli("submit", "--dry-run", "--limit", "5", OPENAI_BASE_URL=ELSEWHERE)
    assert made.code == 0, made.err
    assert "Summarise: text 0" in made.out
    assert "5 documents" in made.out
    assert "US dollars at" in made.out
    assert "Document 1 would not be sent: document 1 has no field text" in made.out
    assert f"The requests would go to {ELSEWHERE}. Nothing was sent." in made.out
    assert openai.requests() == []


@pytest.mark.thorough
def test_dry_run_counts_unsent_files(job: Job, openai: FakeOpenAI) -> None:
    """A start that could not send has planned files; the next start sends them as well."""
    openai.configure(faults=[{"kind": "bad_request_400", "when": {"route": "files.create"}}])
    assert job.cli("submit").code == 2
    shown = job.cli("run", "--dry-run", "--json").json
    assert (shown["documents"], shown["waiting"]) == (0, 25)
    refused = job.cli("run", "--max-cost", "0")
    assert refused.code == 2
    assert "25 documents may cost up to" in refused.err


@pytest.mark.slow
def test_unsent_files_are_priced_by_their_own_model(job: Job, openai: FakeOpenAI) -> None:
    """The settings have changed since: the files still ask the dear model for long answers."""
    openai.configure(faults=[{"kind": "bad_request_400", "when": {"route": "files.create"}}])
    dear = {"OPENAI_MODEL": "gpt-4o", "OPENAI_MAX_TOKENS": "900"}
    assert job.cli("submit", **dear).code == 2
    price = job.cli("run", "--dry-run", "--json", **dear).json["most_usd"]
    assert job.cli("run", "--dry-run", "--json").json["most_usd"] == price > 0
    refused = job.cli("run", "--max-cost", f"{price * 0.9:.6f}")
    assert refused.code == 2
    assert "25 documents may cost up to" in refused.err
    assert openai.stats()["batches_created"] == 0


def test_max_cost_refuses_before_sending(job: Job, openai: FakeOpenAI) -> None:
    """Nothing is claimed either; below the limit the run completes."""
    price = job.cli("run", "--dry-run", "--json").json["most_usd"]
    before = snapshot(job)
    for action in ("run", "submit"):
        refused = job.cli(action, "--max-cost", f"{price * 0.9:.6f}")
        assert refused.code == 2, refused.err
        assert "--max-cost" in refused.err
    assert openai.requests() == []
    assert snapshot(job) == before
    assert job.cli("run", "--max-cost", f"{price * 1.1:.6f}").code == 0
    assert job.statuses() == {"completed": 25}


@pytest.mark.slow
def test_max_cost_holds_for_the_whole_run(job: Job, openai: FakeOpenAI) -> None:
    """Documents that become pending again were not in the sum, so they wait for another start."""
    openai.configure(faults=[{"kind": "line_status", "status": 500, "when": {"from": 1, "to": 1}, "times": 3}])
    ended = job.cli("run", "--max-cost", "1", "--json")
    assert ended.code == 0, ended.err
    assert job.statuses() == {"completed": 22, "pending": 3}
    assert openai.stats()["lines_submitted"] == 25
    assert job.cli("run", "--max-cost", "1").code == 0
    assert job.statuses() == {"completed": 25}


def test_max_cost_refuses_model_of_unknown_price(job: Job, openai: FakeOpenAI) -> None:
    """Nothing is sent."""
    refused = job.cli("run", "--max-cost", "1000", OPENAI_MODEL="nobody-knows-it")
    assert refused.code == 2
    assert "the price of nobody-knows-it is not known" in refused.err
    assert openai.requests() == []
    assert "price unknown" in job.cli("run", "--dry-run", OPENAI_MODEL="nobody-knows-it").out


@pytest.mark.thorough
def test_limit_bounds_sent_documents(job: Job, openai: FakeOpenAI) -> None:
    """The other documents stay pending."""
    assert job.cli("run", "--limit", "12").code == 0
    assert job.statuses() == {"completed": 12, "pending": 13}
    assert openai.stats()["lines_billed"] == 12


def test_external_address_needs_permission(job: Job, openai: FakeOpenAI) -> None:
    """The flag or the variable gives it; a loopback address needs none."""
    for action in ("run", "submit", "poll", "cancel"):
        refused = job.cli(action, OPENAI_BASE_URL=ELSEWHERE)
        assert refused.code == 2, refused.err
        assert "--allow-external" in refused.err
    assert job.statuses() == {"pending": 25}
    # Allowed, it gets as far as the missing key, which comes before any request.
    for flags, allowed in ((("--allow-external",), {}), ((), {"ALLOW_EXTERNAL_LLM": "true"})):
        without_key = job.cli("run", *flags, OPENAI_BASE_URL=ELSEWHERE, OPENAI_API_KEY="", **allowed)
        assert without_key.code == 2
        assert "OPENAI_API_KEY" in without_key.err


@pytest.mark.parametrize(
    ("action", "flags", "named"),
    [
        ("poll", ("--dry-run",), "--dry-run"),
        ("status", ("--limit", "3"), "--limit"),
        ("cancel", ("--max-cost", "0"), "--max-cost"),
        ("run", ("--max-cost", "-1"), "--max-cost"),
        ("run", ("--max-cost", "nan"), "--max-cost"),
        ("run", ("--poll-interval", "0"), "--poll-interval"),
        ("start", (), "start"),
    ],
)
def test_flag_without_effect_is_refused(action: str, flags: tuple[str, ...], named: str, job: Job) -> None:
    """The message names the flag."""
    refused = job.cli(action, *flags)
    assert refused.code == 2
    assert named in refused.err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1", "SchemaConfig"),
        ("def f(:", "not valid Python"),
        ("import nowhere_at_all", "nowhere_at_all"),
        (
            "from openai_batch import SchemaConfig\nschema = SchemaConfig(query_template={'$where': 'sleep(1)'})",
            "query_template.$where is not allowed",
        ),
    ],
)
def test_unusable_schema_file_is_exit_code_2(text: str, named: str, job: Job) -> None:
    """With one sentence and no traceback."""
    job.schema_file.write_text(text)
    refused = job.cli("run")
    assert refused.code == 2
    assert named in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.thorough
def test_openai_away_is_exit_code_3_and_resumes(job: Job, openai: FakeOpenAI, mongodb_uri: str, db_name: str) -> None:
    """For a run and for a single step."""
    openai.kill()
    (job.folder / "step").mkdir()
    settings = {"OUTAGE_LIMIT_S": "0.5"}
    with Job(mongodb_uri, db_name, openai.url, job.folder / "step", collection="others") as other:
        other.fill(5)
        with other.started("submit", **settings) as submitting:  # both wait for it at the same time
            ended = job.cli("run", OUTAGE_LIMIT_S="0.5")
            _, err = submitting.communicate(END_S)
        assert (submitting.returncode, ended.code) == (3, 3), err + ended.err
        assert "no answer from OpenAI" in err
        assert "no answer from OpenAI" in ended.err
        openai.restart()
        assert job.cli("run").code == 0
        assert other.cli("run", **settings).code == 0
        assert (job.statuses(), other.statuses()) == ({"completed": 25}, {"completed": 5})


@pytest.mark.thorough
def test_mongodb_away_is_exit_code_3(job: Job) -> None:
    """For a run and for a dry run. The driver leaves a socket behind, so both are processes of their own."""
    settings = {"MONGODB_URI": "mongodb://127.0.0.1:1", "MONGODB_TIMEOUT_MS": "300", "MONGODB_BACKOFF_S": "0.01"}
    with job.started("run", **settings) as run, job.started("run", "--dry-run", **settings) as dry_run:
        for process in (run, dry_run):
            _, err = process.communicate(END_S)
            assert process.returncode == 3, err


@pytest.mark.slow
def test_output_has_no_secret_and_no_document_text(job: Job, openai: FakeOpenAI) -> None:
    """Also for failures, tracebacks and --verbose. Only a dry run prints texts."""
    job.documents.update_many({}, {"$set": {"text": "CANARY-TEXT-1"}})
    secrets = {
        "OPENAI_API_KEY": "sk-CANARY-SECRET-1",
        "NOTIFICATION_WEBHOOK": "http://127.0.0.1:1/CANARY-SECRET-2",
        "NOTIFICATION_WEBHOOK_SECRET": "CANARY-SECRET-3",
        "NOTIFICATION_EMAIL": "ops@example.com",
        "SMTP_SERVER": "127.0.0.1:1",
        "SMTP_LOGIN": "user:CANARY-SECRET-4",
    }
    openai.configure(
        faults=[
            {"kind": "server_error_500", "when": {"route": "batches.retrieve"}, "message": "CANARY-TEXT-2", "times": 1},
            {"kind": "line_status", "status": 400, "message": "CANARY-TEXT-3", "when": {"from": 2, "to": 3}},
        ]
    )
    # One batch: each takes seconds until its notifications are given up.
    with job.started("run", "--verbose", "--limit", "7", **secrets) as running:
        out, err = running.communicate(timeout=END_S)
    assert running.returncode == 1, err
    openai.configure(
        faults=[{"kind": "unauthorized_401", "message": "Incorrect API key provided: sk-CANARY-SECRET-1."}]
    )
    job.documents.update_many({}, {"$set": {"ai_status": "pending"}})
    refused = job.cli("run", **secrets)
    assert refused.code == 2
    assert "OPENAI_API_KEY" in refused.err
    own = "".join(path.read_text("latin-1") for path in (job.folder / "state").iterdir() if "ledger" in path.name)
    assert "CANARY" not in out + err + refused.out + refused.err + own


@pytest.mark.thorough
def test_cli_import_loads_no_library_of_document_jobs() -> None:
    """Neither a run of the batch worker nor ``--help`` must wait for them."""
    code = (
        "import sys, cli\n"
        "print(sorted({'openai', 'httpx2', 'jinja2', 'genai_prices', 'smtplib'} & set(sys.modules)))\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print('openai' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "False")


def test_progress_without_terminal_prints_occasional_lines() -> None:
    """A new text is printed if the last line is old enough; the final text is always printed."""
    now, out = [0.0], io.StringIO()
    with JobProgress(Console(file=out), clock=lambda: now[0]) as progress:
        for step in range(100):
            progress(f"shard 1: in_progress, {step} of 100 done")
            now[0] += 0.3
        for _ in range(100):
            progress("shard 1: finalizing, 100 of 100 done")
            now[0] += 0.3
    lines = out.getvalue().splitlines()
    assert lines[0] == "shard 1: in_progress, 0 of 100 done"
    assert lines[-1] == "shard 1: finalizing, 100 of 100 done"
    assert len(lines) == len(set(lines))
    assert 100 * 0.3 / LINE_EVERY_S - 1 <= len(lines) <= 100 * 0.3 / LINE_EVERY_S + 2


@pytest.mark.thorough
def test_progress_on_terminal_is_redrawn(job: Job) -> None:
    """One line for each batch."""
    environment = job.environment(TERM="xterm", COLUMNS="100", POLL_INTERVAL="0.5")
    with Terminal() as terminal, open(os.devnull, "r+b") as nothing:
        streams = [nothing.fileno(), nothing.fileno(), terminal.inner]
        with ForkedProcess(job.command("run"), environment, job.folder, None, streams=streams) as process:
            seen = terminal.shown_until_end_of(process)
            assert process.wait(60) == 0
    assert "shard 3: " in seen
    assert " of 10 done" in seen
    assert "\x1b[2K" in seen  # the progress line is erased and drawn again


@pytest.mark.thorough
def test_sigint_ends_like_sigterm(job: Job, openai: FakeOpenAI) -> None:
    """With 130 and no traceback."""
    openai.configure(polls_until_done=0)
    with job.started("run") as running:
        openai.wait_for("requests:batches.retrieve", at_least=3)
        ended = running.stop(signal.SIGINT)
    assert ended.code == 130
    assert "Traceback" not in ended.err
