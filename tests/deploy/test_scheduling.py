"""deploy/systemd, deploy/cronjob.yaml and the Prefect flow: valid, in accord with the exit codes, and the flow really run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from commands.flags import create_parser
from config.settings import Settings
from error_handler import ExitCode
from tests.worker.site import Site, filled

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy/systemd").iterdir())
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/cronjob.yaml").read_text(encoding="utf-8")))
PREFECT = ROOT / ".venv-prefect/bin/python"
GRACE_S = Settings.model_fields["shutdown_grace_s"].default


def unit(name: str) -> ConfigParser:
    """Return the sections of a unit file."""
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(ROOT / "deploy/systemd" / name, encoding="utf-8")
    return parser


def codes(text: str) -> set[ExitCode]:
    return {ExitCode(int(code)) for code in text.split()}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_unit_is_valid_for_systemd(path: Path, tmp_path: Path) -> None:
    """systemd-analyze has one complaint at most: the product is not installed in /srv/triad."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    for other in UNITS:  # a timer is checked together with its service
        shutil.copy(other, tmp_path)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [
        line for line in ended.stderr.splitlines() if "/srv/triad/.venv/bin/python is not executable" not in line
    ]
    assert complaints == []


@pytest.mark.parametrize("name", ["triad-batch.service", "triad-worker.service"])
def test_unit_starts_a_valid_command_and_waits_for_calls_in_flight(name: str) -> None:
    service = unit(name)["Service"]
    program, script, *flags = service["ExecStart"].split()
    assert (program, script) == ("/srv/triad/.venv/bin/python", "cli.py")
    create_parser().parse_args(flags)
    assert float(service["TimeoutStopSec"]) > GRACE_S
    assert codes(service["SuccessExitStatus"]) == {ExitCode.INTERRUPTED}


def test_units_leave_the_settings_to_the_program() -> None:
    """It reads .env itself. systemd would keep a comment after a value, and the environment wins over .env."""
    services = [path.name for path in UNITS if path.suffix == ".service"]
    assert len(services) == 3
    for name in services:
        service = unit(name)["Service"]
        assert "EnvironmentFile" not in service
        assert service["WorkingDirectory"] == "/srv/triad"


def test_units_restart_only_if_another_try_can_help() -> None:
    """MongoDB or the model server that does not answer (3) is such a case; the daemon also comes back after too many failures."""
    never = codes(unit("triad-batch.service")["Service"]["RestartPreventExitStatus"])
    assert never == set(ExitCode) - {ExitCode.DONE, ExitCode.UNREACHABLE, ExitCode.INTERRUPTED}
    daemon = codes(unit("triad-worker.service")["Service"]["RestartPreventExitStatus"])
    assert daemon == {ExitCode.CONFIGURATION, ExitCode.LOCKED}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifest_is_valid_for_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_cron_job_runs_one_worker_on_its_volume_and_knows_the_exit_codes() -> None:
    """Each exit code but 0 and 3 has a rule: 3 counts as a failed try."""
    cron = next(one for one in MANIFESTS if one["kind"] == "CronJob")["spec"]
    job = cron["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    (worker,) = pod["containers"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert pod["terminationGracePeriodSeconds"] > GRACE_S
    assert worker["command"][:2] == ["python", "cli.py"]
    create_parser().parse_args(worker["command"][2:])
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert worker["image"] in (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in image
    folders = {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert set(re.findall(r'VOLUME \["(.+?)"\]', image)) | {"/tmp"} == folders
    rules = [rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    known = {rule["action"]: {ExitCode(code) for code in rule["onExitCodes"]["values"]} for rule in rules}
    assert known == {
        "Ignore": {ExitCode.INTERRUPTED},
        "FailJob": set(ExitCode) - {ExitCode.DONE, ExitCode.UNREACHABLE, ExitCode.INTERRUPTED},
    }
    assert all(rule["onExitCodes"]["containerName"] == worker["name"] for rule in rules)


def run_flow(site: Site, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the flow with a Prefect server of its own, which nobody else sees and which tells nobody of it."""
    private = {
        "PREFECT_HOME": str(site.folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "200",
        "DO_NOT_TRACK": "1",
    }
    command = [str(PREFECT), str(ROOT / "examples/prefect_flow.py"), "--python", sys.executable, "--folder", "reports"]
    environment = {**site.environment(**settings), **private}
    return subprocess.run(command, cwd=site.folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PREFECT.exists(), reason="Prefect is not installed: make test-slow")
def test_flow_labels_and_writes_its_files_and_fails_with_the_command(site: Site) -> None:
    """A wrong setting (exit code 2) ends the flow with the sentence of the command, and nothing is reported."""
    filled(site, 3)
    wrong = run_flow(site, BATCH_SIZE="0")
    assert wrong.returncode == 1
    assert "ended with exit code 2: " in wrong.stderr
    assert "BATCH_SIZE" in wrong.stderr
    assert list((site.folder / "reports").iterdir()) == []
    right = run_flow(site)
    assert right.returncode == 0, right.stderr
    assert json.loads(right.stdout) == {"successful": 3, "failed": 0, "skipped": 0}
    assert sorted(path.name for path in (site.folder / "reports").iterdir()) == [
        "labels.csv",
        "report.html",
        "run.json",
    ]
    assert site.results.count_documents({}) == 3
    assert "parcel" not in right.stderr
