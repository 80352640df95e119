"""deploy/kuberay-values.yaml names variables and versions that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from config.settings import known_environment_names

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kuberay-values.yaml").read_text(encoding="utf-8"))


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["containerEnv"]}


def test_version_of_ray_is_the_one_of_the_image() -> None:
    requirements = (ROOT / "requirements-ray.txt").read_text(encoding="utf-8")
    assert f"ray[default]=={VALUES['head']['rayVersion']} " in requirements
    assert f"ray[default]=={VALUES['head']['rayVersion']} " in (ROOT / "requirements-dev.txt").read_text(
        encoding="utf-8"
    )


def test_variables_are_ours_or_those_of_ray() -> None:
    names = {name for part in ("head", "worker", "common") for name in variables(VALUES[part])}
    assert {name for name in names if not name.startswith("RAY_")} <= known_environment_names()


def test_calls_in_flight_fit_into_the_end_of_a_pod() -> None:
    """Kubernetes kills a pod after 30 s; the grace period of a worker is the shortest of the three."""
    grace_s = float(variables(VALUES["head"])["SHUTDOWN_GRACE_S"])
    assert grace_s < float(variables(VALUES["common"])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < 30


def test_state_is_where_the_image_keeps_it() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"BATCH_FILES_DIR=(\S+)/batch_files", dockerfile)
    assert found is not None
    for part in ("head", "worker"):
        assert found[1] in {mount["mountPath"] for mount in VALUES[part]["volumeMounts"]}
