"""The fake OpenAI as a process: who is let in, restarts, and what the class refuses."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from tests.fakes import fake_openai
from tests.fakes.fake_openai import FakeOpenAI, FakeOpenAIError
from tests.fakes.fake_openai_client import (
    client_of,
    content,
    documents,
    jsonl,
    lines_of,
    submit,
)

# The door


def test_no_key_no_answer(fake: FakeOpenAI) -> None:
    assert httpx2.get(f"{fake.url}/models").status_code == 401
    fake.configure(api_keys=["sk-right"])
    with client_of(fake, api_key="sk-wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    with client_of(fake, api_key="sk-right") as client:
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"


def test_answers_carry_request_id_and_rate_limits(client: openai.OpenAI) -> None:
    raw = client.models.with_raw_response.list()
    assert raw.request_id is not None
    assert raw.request_id.startswith("req_")
    assert int(raw.headers["x-ratelimit-remaining-requests"]) > 0
    with pytest.raises(openai.NotFoundError, match="Invalid URL"):
        client.get("/poems", cast_to=object)


# The process


@pytest.fixture
def own() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as started:
        yield started
        assert started.stats()["internal_errors"] == 0


def test_a_killed_fake_loses_nothing_that_it_answered(own: FakeOpenAI) -> None:
    fake, client = own, client_of(own)
    batch = submit(client, jsonl(documents(4)), metadata={"shard": "7"})
    fake.advance(300)
    other = submit(client, jsonl(documents(2)))
    done_before = fake.stats()
    fake.kill()
    fake.restart()
    assert client.batches.retrieve(batch.id).metadata == {"shard": "7"}
    assert client.batches.retrieve(batch.id).status == "in_progress"
    fake.advance(1000)
    done = client.batches.retrieve(batch.id)
    assert done.status == client.batches.retrieve(other.id).status == "completed"
    assert len(lines_of(content(fake, done.output_file_id))) == 4
    stats = fake.stats()
    assert stats["batches_created"] == 2
    assert stats["requests:batches.create"] == done_before["requests:batches.create"] == 2
    assert stats["max_billed_per_line"] == 2, "doc-0 ran in both batches"


def test_faults_that_struck_before_a_restart_do_not_strike_again(own: FakeOpenAI) -> None:
    fake, client = own, client_of(own)
    fake.configure(faults=[{"kind": "server_error_500", "times": 1}])
    with pytest.raises(openai.InternalServerError):
        client.models.list()
    fake.restart()
    assert client.models.list().data


def test_a_directory_of_ones_own_stays(tmp_path: Path) -> None:
    with FakeOpenAI(directory=tmp_path) as first, client_of(first) as client:
        batch = submit(client, jsonl(documents(1)))
    with FakeOpenAI(directory=tmp_path) as second, client_of(second) as client:
        assert client.batches.retrieve(batch.id).id == batch.id


def test_it_dies_with_its_parent_and_leaves_nothing() -> None:
    script = (
        "import os; from tests.fakes.fake_openai import FakeOpenAI; fake = FakeOpenAI(); fake.start();"
        "print(fake.pid, fake.path_of('x').parent.parent, flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(fake_openai.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid, directory = done.stdout.split()
    psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=60)
    assert not psutil.pid_exists(int(pid))
    assert not Path(directory).exists()


def test_unknown_knobs_faults_and_gauges_are_refused(fake: FakeOpenAI) -> None:
    for knobs in ({"tempo": 3}, {"faults": [{"kind": "mood"}]}, {"faults": [{"kind": "reset", "when": {"moon": 1}}]}):
        with pytest.raises(FakeOpenAIError, match="use one of"):
            fake.configure(**knobs)
    with pytest.raises(FakeOpenAIError, match="unknown gauge"):
        fake.wait_for("mood", 1)
    with pytest.raises(FakeOpenAIError, match="did not get there"):
        fake.wait_for("batches_created", 1, timeout_s=0.05)
    with pytest.raises(FakeOpenAIError, match="runs already"):
        fake.start()


def test_a_paused_fake_accepts_and_never_answers(own: FakeOpenAI) -> None:
    fake = own
    fake.pause()
    with client_of(fake, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.models.list()
    fake.resume()
    with client_of(fake) as client:
        assert client.models.list().data
