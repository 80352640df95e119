"""The files in deploy/: each series, label and value that they name is exported by a real worker or service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from error_handler import ErrorKind, Reason
from service import errors
from tests.service.service_process import serve
from tests.worker.site import Site, filled, model_of

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text(encoding="utf-8"))

SELECTOR = re.compile(r"\b(triad_\w+|process_\w+|up)\b(?:{([^}]*)})?")
MATCHER = re.compile(r'(\w+)\s*(=~|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")
TARGET_LABELS = {"job", "instance"}  # Prometheus adds them

Series = dict[str, dict[str, set[str]]]  # name -> label -> values


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Return every PromQL expression of the dashboard and of the rules."""
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [*(target["expr"] for target in targets), *(rule["expr"] for rule in rules())]


def exported(*texts: str) -> Series:
    """Return the series in *texts*, in Prometheus' text format."""
    found: Series = defaultdict(lambda: defaultdict(set))
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found[sample.name]
                for name, value in sample.labels.items():
                    labels[name].add(value)
    return found


def real_series(site: Site) -> Series:
    """Return what a worker and a service export after they have done something."""
    filled(site, 3)
    assert site.run("--progress-files", MAX_CONCURRENT="auto").code == 0
    worker = (site.directory / "progress/metrics.prom").read_text()
    with serve(site.folder, OLLAMA_ENDPOINT=model_of(site).url, OLLAMA_MODEL="llama3.2") as service:
        assert service.classify({"conversation_number": "1", "messages": []}).status == 422
        assert service.classify().status == 200
        return exported(worker, service.get("/metrics").body.decode(), 'up{job="triad"} 1\n')


def test_dashboard_and_rules_name_exported_series_only(site: Site) -> None:
    """With labels and values that exist; statuses and reasons that did not occur are those that the code can report."""
    series = real_series(site)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, ErrorKind)]
    series["triad_http_requests_total"]["status"] |= {str(kind.status) for kind in kinds}
    series["triad_rejections_total"]["reason"] |= {kind.name for kind in kinds}
    checked = 0
    for expression in expressions():
        names = [match[1] for match in SELECTOR.finditer(expression)]
        assert names, expression
        for name, matchers in SELECTOR.findall(expression):
            assert name in series, f"{name} is not exported: {expression}"
            for label, operator, value in MATCHER.findall(matchers):
                assert label in series[name].keys() | TARGET_LABELS, f"{name} has no label {label}: {expression}"
                for one in value.split("|") if operator == "=~" else [value]:
                    is_known = label in TARGET_LABELS or one == "$worker" or one in series[name][label]
                    assert is_known, f"{label}={one} in {expression}"
                    checked += 1
        for labels in GROUPING.findall(expression):
            known = TARGET_LABELS.union(*(series[name] for name in names))
            assert set(labels.replace(" ", "").split(",")) <= known, expression
    assert checked > 40
    assert series["triad_run_failures"]["reason"] == set(map(str, Reason))


def test_dashboard_can_be_imported() -> None:
    """Panels have unique ids and do not overlap; each query uses the data source that the person chooses."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in panels:
        assert panel["title"]
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["expr"].count("(") == target["expr"].count(")")


def test_each_alert_says_what_to_do_and_has_a_job() -> None:
    """The scrape configuration has the jobs and the file that the rules expect."""
    assert len({rule["alert"] for rule in rules()}) == len(rules()) == 12
    for rule in rules():
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("critical", "warning")
    jobs = {job["job_name"] for job in CONFIG["scrape_configs"]}
    named = {value for text in expressions() for label, _, value in MATCHER.findall(text) if label == "job"}
    assert named <= jobs == {"triad", "triad-worker"}
    assert all((DEPLOY / name).is_file() for name in CONFIG["rule_files"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_in_prometheus() -> None:
    """``rules_test.yaml`` has the series of healthy and of broken workers."""
    for command in (
        ["check", "config", "--syntax-only", DEPLOY / "prometheus.yaml"],
        ["test", "rules", "rules_test.yaml"],
    ):
        done = subprocess.run(
            ["promtool", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
