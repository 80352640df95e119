"""The load test script counts every kind of answer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from error_handler import ExitCode
from tests import performance_test
from tests.fakes.scripted_service import Reply, ScriptedService, error, scripted_service
from tests.in_process import run_script as run_in_process
from tests.performance_test import Load, conversation, percentile

ROOT = Path(__file__).parent.parent


def run_script(service: ScriptedService, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_in_process(
        performance_test.main, ROOT / "tests/performance_test.py", ["--url", service.url, *flags], os.environ, ROOT
    )


@pytest.mark.slow
def test_every_answer_is_counted(tmp_path: Path) -> None:
    """200, and 503 with Retry-After, are accepted; all requests differ."""
    output = tmp_path / "load.json"
    with scripted_service(
        lambda number, nth: error(503, "QueueFullError", Retry_After="1") if number.endswith("3") else Reply()
    ) as service:
        run = run_script(service, "--requests", "40", "--concurrency", "5", "--output", str(output))
    assert run.returncode == ExitCode.DONE, run.stderr
    assert len(service.asked) == 40
    assert service.most_in_flight <= 5
    measured = json.loads(output.read_text())
    assert {status: len(values) for status, values in measured["latencies_s"].items()} == {"200": 36, "503": 4}
    assert measured["health_s"]
    assert "503: 4 with Retry-After, 0 without" in run.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("reply", "sign"),
    [
        (error(503, "QueueFullError"), "0 with Retry-After, 1 without"),
        pytest.param(error(500, "InternalError"), "500"),
        pytest.param(error(422, "ValidationError"), "422"),
    ],
)
def test_unexpected_answer_exits_with_1(reply: Reply, sign: str) -> None:
    """One of ten requests suffices."""
    with scripted_service(lambda number, nth: reply if number == "load-7" else Reply()) as service:
        run = run_script(service, "--requests", "10", "--concurrency", "2")
    assert run.returncode == ExitCode.INCOMPLETE
    assert sign in run.stdout


@pytest.mark.thorough
def test_timeout_counts_as_no_answer() -> None:
    with scripted_service() as service:
        service.close()
        run = run_script(service, "--requests", "1", "--concurrency", "1", "--timeout", "0.3")
    assert run.returncode == ExitCode.INCOMPLETE
    assert "no answer: 1 x" in run.stdout


def test_unreachable_service_exits_with_3() -> None:
    with scripted_service() as service:
        pass
    run = run_script(service, "--requests", "5")
    assert run.returncode == ExitCode.UNREACHABLE
    assert run.stderr.startswith("performance_test.py: No service answers at")


def test_failing_health_is_not_clean() -> None:
    """A load balancer would consider the service dead."""
    assert Load(latencies_s={"200": [0.1]}).is_clean
    assert not Load(latencies_s={"200": [0.1]}, health_failed=1).is_clean


def test_bodies_differ_and_can_be_large() -> None:
    """No answer can come from a cache."""
    assert len({conversation(number, 0) for number in range(2000)}) == 2000
    assert len(conversation(1, 10_000)) > 10_000
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
