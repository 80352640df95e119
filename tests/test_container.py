"""What can be known of the image and of compose.yaml without a container engine."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import Settings
from config.settings import known_environment_names
from tests.fakes.scripted_service import scripted_service

ROOT = Path(__file__).parent.parent
NOT_PRODUCT = {"tests", "benchmarks"}
INDEX_PACKAGE = (
    "embedding_index/"  # loaded only where requirements-index.txt is installed as well: --build-arg INDEX=yes
)
EMBEDDED_ONLY = {"utils/demo_batch_processor.py"}  # needs requirements-embedded.txt, which the image leaves out


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, in order: (name, arguments), lines joined, comments gone."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def final_stage() -> list[tuple[str, str]]:
    start = max(index for index, (name, _) in enumerate(instructions()) if name == "FROM")
    return instructions()[start:]


def last(name: str) -> str:
    """The arguments of the last instruction *name* of the final stage; the one that counts."""
    return [rest for found, rest in final_stage() if found == name][-1]


def environment_of_the_image() -> dict[str, str]:
    pairs = [shlex.split(rest) for name, rest in final_stage() if name == "ENV"]
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def tracked_or_new() -> list[str]:
    """Every file of the working tree that a build would look at, apart from folders of tools."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in {".git", ".venv", "__pycache__"} and "cache" not in name]
        found += [str(Path(folder, name).relative_to(ROOT)) for name in files]
    return found


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets *path* into the build; the last pattern that matches decides."""
    included = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            # A pattern covers a file, or the folder that it lies in; * stops at a slash.
            parts = path.split("/")
            heads = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
            if any(h.count("/") == pattern.count("/") and fnmatch.fnmatchcase(h, pattern) for h in heads):
                included = line.startswith("!")
    return included


def copied() -> set[str]:
    """The files of the project that end in the image."""
    sources = []
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            sources += shlex.split(rest)[:-1]
    return {
        path
        for path in tracked_or_new()
        if is_in_context(path)
        and any(
            path.startswith(source)
            if source.endswith("/")
            else path.count("/") == source.count("/") and fnmatch.fnmatchcase(path, source)
            for source in sources
        )
    }


def product_modules() -> set[str]:
    """Every module of the flat layout and of its packages, those added later included."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in NOT_PRODUCT]
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    return {str(path.relative_to(ROOT)) for path in files}


def test_every_product_module_is_in_the_image() -> None:
    """A new module or package that nobody copies would be missing at its first import."""
    assert product_modules() - copied() == set()
    assert "config/taxonomy.yaml" in copied()
    assert "data/sample_conversations.jsonl" in copied()
    assert "schema_examples/customer_service_schema.py" in copied()


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        "config/.env.example",
        ".git/config",
        "tests/conftest.py",
        "data/embedded/db/mongod.lock",
        "data/classified_results_20261121T100000Z.json",
        "data/classified_results_a_0.journal.jsonl",
        "batch_files/checkpoint.json",
        "key.txt",
    ],
)
def test_secrets_state_and_results_never_reach_the_build(path: str) -> None:
    """The context is a list of what belongs in it, so what is new stays out."""
    assert not is_in_context(path)


def named_in(requirements: str) -> set[str]:
    """The normalised names of the packages that a file of requirements pins; extras do not count."""
    text = (ROOT / requirements).read_text()
    names = re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[a-z]+\])?==", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_what_is_copied_needs_only_what_is_installed() -> None:
    """Each package that the modules of the image import is in requirements.txt, or for the index in its own file."""
    installed = named_in("requirements.txt")
    own = {Path(path).parts[0].removesuffix(".py") for path in product_modules()}
    providers = packages_distributions()
    missing = {}
    for path in product_modules() - EMBEDDED_ONLY:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names):
                distributions = {re.sub(r"[-_.]+", "-", name).lower() for name in providers.get(top, [top])}
                allowed = installed | (named_in("requirements-index.txt") if path.startswith(INDEX_PACKAGE) else set())
                # Starlette, bson, urllib3 and httpx2 come with the package that the module uses them for.
                if not distributions & (allowed | {"starlette", "urllib3", "httpx2"}):
                    missing[top] = path
    assert missing == {}


def test_the_image_installs_no_database() -> None:
    """The embedded mongod and what imitates MongoDB are 60 MB that a container has no use for."""
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"^(fiftyone|pycurl|mongomock|motor)", text, re.MULTILINE)


def test_nothing_runs_as_root() -> None:
    """A number other than 0, for the group too."""
    user = re.fullmatch(r"(\d+):(\d+)", last("USER"))
    assert user
    assert min(map(int, user.groups())) >= 1000


def test_signals_reach_python() -> None:
    """A shell in between would swallow SIGTERM, and an entry point would stand before `python cli.py`."""
    assert last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(last("CMD")) == ["python", "main.py"]
    assert not [rest for name, rest in final_stage() if name == "ENTRYPOINT"]


def test_the_build_takes_no_secret_and_no_moving_tag() -> None:
    """What is given as ARG or ENV stays readable in the image; `latest` is another image tomorrow."""
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            assert not re.search(r"KEY|SECRET|PASSWORD|TOKEN|URI", rest), rest
        if name == "FROM":
            assert re.match(r"[\w./-]+:(?!latest)[\w.-]+", rest), rest
    own = {name for name in environment_of_the_image() if not name.startswith("PYTHON") and name != "PATH"}
    assert own <= known_environment_names()


def test_the_state_of_the_worker_lies_in_the_volume() -> None:
    """With a read-only root everything else is out of reach."""
    environment = environment_of_the_image()
    volumes = json.loads(last("VOLUME"))
    assert any(environment["BATCH_FILES_DIR"].startswith(f"{volume}/") for volume in volumes)
    assert all(volume in dict(final_stage())["RUN"] for volume in volumes)


def run_health_check(port: int) -> int:
    command = last("HEALTHCHECK").partition("CMD ")[2]
    _, *arguments = json.loads(command)
    environment = {"PATH": os.environ["PATH"], "API_PORT": str(port)}
    return subprocess.run(
        [sys.executable, *arguments], check=False, env=environment, stderr=subprocess.DEVNULL, timeout=60
    ).returncode


def test_the_health_check_tells_alive_from_dead() -> None:
    """The very command of the Dockerfile, against a server and against none."""
    with scripted_service() as service:
        port = int(service.url.rpartition(":")[2])
        assert run_health_check(port) == 0
    assert run_health_check(port) != 0


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text()))


def own_services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in compose["services"].items() if "build" in service}


def test_compose_has_the_parts(compose: dict[str, Any]) -> None:
    """The worker only when asked for."""
    assert {"mongo", "ollama", "api", "worker"} <= compose["services"].keys()
    assert own_services(compose).keys() == {"api", "worker"}
    assert compose["services"]["worker"]["profiles"] == ["worker"]
    assert "profiles" not in compose["services"]["api"]
    assert compose["services"]["mongo"]["image"] == "mongo:8"


def test_compose_names_only_variables_that_exist(compose: dict[str, Any]) -> None:
    """A misspelt one would be ignored; and .env is read by compose and by the product alike, which refuses unknown names."""
    for service in own_services(compose).values():
        assert service["environment"].keys() <= known_environment_names()
    text = (ROOT / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{?([A-Z_]+)", "\n".join(li for li in text.splitlines() if not li.startswith("#")))) <= (
        known_environment_names()
    )


def test_compose_holds_no_secret(compose: dict[str, Any]) -> None:
    """What is secret comes from outside and has no default; no address has credentials."""
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|SECRET|PASSWORD|TOKEN", name):
                assert value == "${" + name + ":-}"
            assert "@" not in str(value)


def test_compose_publishes_on_this_machine_only(compose: dict[str, Any]) -> None:
    """MongoDB has no password here, and Ollama never has one."""
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_waits_for_what_is_needed(compose: dict[str, Any]) -> None:
    """Each dependency has a condition, and where that is health, a health check."""
    for service in compose["services"].values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] in {"service_healthy", "service_started", "service_completed_successfully"}
            if how["condition"] == "service_healthy":
                assert compose["services"][name]["healthcheck"]["test"][0] == "CMD"
    assert compose["services"]["worker"]["depends_on"]["mongo"]["condition"] == "service_healthy"


def test_compose_locks_our_containers_down(compose: dict[str, Any]) -> None:
    """No capability, no new rights, nothing to write to but /tmp and the volume; time to finish what is in flight."""
    for service in own_services(compose).values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"]
        assert int(service["stop_grace_period"].removesuffix("s")) > Settings.model_fields["shutdown_grace_s"].default
    volumes = [mount for service in compose["services"].values() for mount in service.get("volumes", [])]
    assert all(mount.partition(":")[0] in compose["volumes"] for mount in volumes), "a folder of the host is mounted"
    assert json.loads(last("VOLUME"))[0] == compose["services"]["worker"]["volumes"][0].partition(":")[2]


def test_images_of_others_have_a_version(compose: dict[str, Any]) -> None:
    """`latest` would be another program tomorrow."""
    images = {service["image"] for service in compose["services"].values() if "build" not in service}
    assert all(re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", image) for image in images)
