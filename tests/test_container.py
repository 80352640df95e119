"""Checks of the image and of compose.yaml that need no container engine."""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import Settings
from config.settings import known_environment_names
from tests.fakes.scripted_service import scripted_service
from tests.test_import_graph import forget_trees, imports

ROOT = Path(__file__).parent.parent
NOT_PRODUCT = {"tests", "benchmarks"}
# loaded only if requirements-index.txt is installed as well: --build-arg INDEX=yes
INDEX_PACKAGES = ("database_docs/", "embedding_index/")
# loaded only if requirements-evaluation.txt is installed as well: --build-arg EVALUATION=yes
EVALUATION_PACKAGE = "evaluation/"
# loaded only if requirements-student.txt is installed as well: --build-arg STUDENT=yes
STUDENT_PACKAGES = ("student/", "commands/student_")
# loaded only if requirements-export.txt is installed as well: --build-arg EXPORT=yes
EXPORT_PACKAGE = "exporting/"
# loaded only if requirements-ray.txt is installed as well: --build-arg RAY=yes
RAY_PACKAGE = "cluster/"
# Imported by embedded/choice.py only if requirements-embedding.txt is installed, as requirements-index.txt does.
OPTIONAL = {
    f"embedded/{name}.py"
    for name in ("minilm", "bfloat16", "conversation_vectors", "label_scores", "embedding_classifier")
}
EMBEDDED_ONLY = {"utils/demo_batch_processor.py"}  # needs requirements-embedded.txt, which is not in the image


@functools.cache
def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile as (name, arguments), with joined lines and without comments."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def final_stage() -> list[tuple[str, str]]:
    start = max(index for index, (name, _) in enumerate(instructions()) if name == "FROM")
    return instructions()[start:]


def last(name: str) -> str:
    """Return the arguments of the last, effective instruction *name* of the final stage."""
    return [rest for found, rest in final_stage() if found == name][-1]


def environment_of_the_image() -> dict[str, str]:
    pairs = [shlex.split(rest) for name, rest in final_stage() if name == "ENV"]
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def tracked_or_new() -> list[str]:
    """Return every file of the working tree that a build would read, without the folders of tools."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in {".git", ".venv", "__pycache__"} and "cache" not in name]
        found += [str(Path(folder, name).relative_to(ROOT)) for name in files]
    return found


@functools.cache
def context_rules() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_in_context(path: str) -> bool:
    """Return whether .dockerignore includes *path*; the last matching pattern decides."""
    # A pattern matches a file or its folder; * stops at a slash.
    parts = path.split("/")
    heads = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    included = True
    for line in context_rules():
        pattern = line.removeprefix("!")
        if any(h.count("/") == pattern.count("/") and fnmatch.fnmatchcase(h, pattern) for h in heads):
            included = line.startswith("!")
    return included


@functools.cache
def copied() -> set[str]:
    """Return the files of the project that are in the image."""
    sources = []
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            sources += shlex.split(rest)[:-1]
    return {
        path
        for path in tracked_or_new()
        if any(
            path.startswith(source)
            if source.endswith("/")
            else path.count("/") == source.count("/") and fnmatch.fnmatchcase(path, source)
            for source in sources
        )
        and is_in_context(path)
    }


def product_modules() -> set[str]:
    """Return every module of the product, also those added later."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in NOT_PRODUCT]
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    return {str(path.relative_to(ROOT)) for path in files}


def test_every_product_module_is_in_the_image() -> None:
    """A new module that is not copied would fail at its first import."""
    assert product_modules() - copied() == set()
    assert "config/taxonomy.yaml" in copied()
    assert {"evaluation/report.html.j2", "analytics/report.html.j2"} <= copied()
    assert {f"service/review_page/page.{kind}" for kind in ("html", "css", "js")} <= copied()
    assert "data/sample_conversations.jsonl" in copied()
    assert {"embedded/weights.safetensors", "embedded/phrases.safetensors"} <= copied()
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
    """The build context is a list of included files, so new files stay out."""
    assert not is_in_context(path)


@functools.cache
def named_in(requirements: str) -> set[str]:
    """Return what the packages of a requirements file let one import."""
    text = (ROOT / requirements).read_text()
    names = re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[a-z]+\])?==", text, re.MULTILINE)
    return set().union(*map(importable, names))


def importable(name: str) -> set[str]:
    """Return the names of the modules and packages of distribution *name*; one that is not installed here has its own."""
    try:
        paths = distribution(name).files or []
    except PackageNotFoundError:
        return {name}
    return {path.parts[0].partition(".")[0] for path in paths if path.suffix in (".py", ".so")}


def test_what_is_copied_needs_only_what_is_installed() -> None:
    """Every imported package is in requirements.txt, or in the file of the index, of the evaluation, the student, the export or Ray."""
    installed = named_in("requirements.txt")
    own = {Path(path).parts[0].removesuffix(".py") for path in product_modules()}
    missing: dict[str, str] = {}
    for path in product_modules() - EMBEDDED_ONLY:
        is_index = path.startswith(INDEX_PACKAGES) or path in OPTIONAL
        allowed = installed | (named_in("requirements-index.txt") if is_index else set())
        if path.startswith(EVALUATION_PACKAGE):
            allowed |= named_in("requirements-evaluation.txt")
        if path.startswith(STUDENT_PACKAGES):
            allowed |= named_in("requirements-student.txt")
        if path.startswith(EXPORT_PACKAGE):
            allowed |= named_in("requirements-export.txt")
        if path.startswith(RAY_PACKAGE):
            allowed |= named_in("requirements-ray.txt")
        # These are dependencies of packages that the module uses.
        allowed |= {"starlette", "urllib3", "httpx2", "markupsafe"}
        known = own | set(sys.stdlib_module_names) | allowed
        # All imports begin so, and some lines of docstrings; parsing all modules takes seconds.
        seen = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE))
        if seen - known:
            missing |= dict.fromkeys({name.split(".")[0] for name in imports(ROOT / path)} - known, path)
    forget_trees()
    assert missing == {}


def test_the_image_installs_no_database() -> None:
    """The embedded mongod and the MongoDB mock are 60 MB that a container does not need."""
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"^(fiftyone|pycurl|mongomock|motor)", text, re.MULTILINE)


def test_nothing_runs_as_root() -> None:
    """The user and group ids are numbers other than 0."""
    user = re.fullmatch(r"(\d+):(\d+)", last("USER"))
    assert user
    assert min(map(int, user.groups())) >= 1000


def test_signals_reach_python() -> None:
    """A shell would swallow SIGTERM, and an entry point would precede `python cli.py`."""
    assert last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(last("CMD")) == ["python", "main.py"]
    assert not [rest for name, rest in final_stage() if name == "ENTRYPOINT"]


def test_the_build_takes_no_secret_and_no_moving_tag() -> None:
    """ARG and ENV values stay readable in the image; `latest` can change."""
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            assert not re.search(r"KEY|SECRET|PASSWORD|TOKEN|URI", rest), rest
        if name == "FROM":
            assert re.match(r"[\w./-]+:(?!latest)[\w.-]+", rest), rest
    own = {name for name in environment_of_the_image() if not name.startswith("PYTHON") and name != "PATH"}
    assert own <= known_environment_names()


def test_the_state_of_the_worker_lies_in_the_volume() -> None:
    """The root file system is read-only."""
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
    """The command of the Dockerfile, with and without a server."""
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
    """The worker starts only with its profile."""
    assert {"mongo", "ollama", "api", "worker"} <= compose["services"].keys()
    assert own_services(compose).keys() == {"api", "worker"}
    assert compose["services"]["worker"]["profiles"] == ["worker"]
    assert "profiles" not in compose["services"]["api"]
    assert compose["services"]["mongo"]["image"] == "mongo:8"


def test_compose_names_only_variables_that_exist(compose: dict[str, Any]) -> None:
    """A misspelt name would be ignored; compose and the product read the same .env, and the product rejects unknown names."""
    for service in own_services(compose).values():
        assert service["environment"].keys() <= known_environment_names()
    text = (ROOT / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{?([A-Z_]+)", "\n".join(li for li in text.splitlines() if not li.startswith("#")))) <= (
        known_environment_names()
    )


def test_compose_holds_no_secret(compose: dict[str, Any]) -> None:
    """Secrets come from the environment without defaults; no address has credentials."""
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|SECRET|PASSWORD|TOKEN", name):
                assert value == "${" + name + ":-}"
            assert "@" not in str(value)


def test_compose_publishes_on_this_machine_only(compose: dict[str, Any]) -> None:
    """MongoDB and Ollama have no passwords here."""
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_waits_for_what_is_needed(compose: dict[str, Any]) -> None:
    """Each dependency has a condition; a dependency on health has a health check."""
    for service in compose["services"].values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] in {"service_healthy", "service_started", "service_completed_successfully"}
            if how["condition"] == "service_healthy":
                assert compose["services"][name]["healthcheck"]["test"][0] == "CMD"
    assert compose["services"]["worker"]["depends_on"]["mongo"]["condition"] == "service_healthy"


def test_compose_locks_our_containers_down(compose: dict[str, Any]) -> None:
    """No capabilities, no new privileges, writable only /tmp and the volume, and time to finish calls in flight."""
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
    """`latest` can change."""
    images = {service["image"] for service in compose["services"].values() if "build" not in service}
    assert all(re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", image) for image in images)
