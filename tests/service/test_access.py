"""Access to the service: keys, rates, host names, exposure, and the addresses on which it listens."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.service_process import (
    CONVERSATION,
    NO_MODEL,
    WITH_PHRASES,
    ServiceProcess,
    free_port,
    run_to_the_end,
    serve,
)

KEY, NEW_KEY, OTHER = "helpdesk-key-0123456789", "helpdesk-key-9876543210", "crm-key-0123456789abcdef"
KEYS = f"helpdesk:{KEY},helpdesk:{NEW_KEY},crm:{OTHER}"
OUTSIDE = "0.0.0.0"
MAIN = (str(Path(__file__).parents[2] / "main.py"),)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    settings = {"API_KEYS": KEYS, "API_EMBEDDED": "true", "API_RATE_LIMIT_PER_MINUTE": "8", "LOG_LEVEL": "DEBUG"}
    with serve(tmp_path_factory.mktemp("keyed"), app=WITH_PHRASES, **settings) as process:
        yield process


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"any:{key}".encode()).decode()


@pytest.mark.parametrize(
    "path",
    [
        *("/metrics", "/docs"),
        *(
            pytest.param(path, marks=pytest.mark.thorough)
            for path in ("/openapi.json", "/docs/assets/swagger-ui.css", "/docs/start.js")
        ),
    ],
)
@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({}, False),
        ({"Authorization": "Bearer wrong-key-0123456789"}, False),
        ({"Authorization": f"Bearer {KEY}x"}, False),
        ({"Authorization": f"Bearer {KEY[:-1]}"}, False),
        ({"Authorization": KEY}, False),
        ({"Authorization": "Basic !!!"}, False),
        ({"X-API-Key": "helpdesk"}, False),
        ({"X-API-Key": KEY}, True),
        ({"Authorization": f"Bearer {NEW_KEY}"}, True),
        ({"Authorization": f"bearer {OTHER}"}, True),
        ({"Authorization": basic(OTHER)}, True),
    ],
    ids=str,
)
def test_operator_pages_require_a_key_if_keys_are_set(
    keyed: ServiceProcess, path: str, headers: dict[str, str], is_let_in: bool
) -> None:
    """/docs, /openapi.json and /metrics; a browser may show the key as a password."""
    answer = keyed.get(path, headers)
    if is_let_in:
        assert answer.status == 200
    else:
        assert (answer.status, answer.error) == (401, "AuthenticationError")
        assert "Bearer" in answer.headers["www-authenticate"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_path_that_differs_from_a_route_leads_nowhere(keyed: ServiceProcess, method: str) -> None:
    """The router ignores a line end after a path; the gate would take it for another path, which needs no key."""
    for path in (
        "/metrics%0A",
        "/openapi.json%0a",
        "/labels%0A",
        "/classify%0A",
        "/similar%0A",
        "//metrics",
        "/metrics/",
    ):
        answer = keyed.request(method, path, CONVERSATION if method == "POST" else None)
        assert (path, answer.status, answer.error) == (path, 404, "NotFoundError")


def test_health_and_readiness_need_no_key(keyed: ServiceProcess) -> None:
    """Orchestrators have no key."""
    assert keyed.get("/health").status == 200
    assert keyed.get("/ready").status == 200


def test_idempotency_keys_are_scoped_to_the_caller(keyed: ServiceProcess) -> None:
    """The scope is the name of the API key; the same request of another caller is another request."""
    replays = [keyed.classify(X_API_Key=key, Idempotency_Key="1") for key in (OTHER, OTHER, KEY, NEW_KEY)]
    assert [answer.status for answer in replays] == [200] * 4
    assert [answer.headers.get("idempotency-replayed") for answer in replays] == [None, "true", None, "true"]


def test_classify_requires_a_key_and_limits_the_rate_by_its_name(keyed: ServiceProcess) -> None:
    """A rate for each name, however many keys it has; the others are not touched."""
    assert keyed.classify().error == "AuthenticationError"
    answers = [keyed.classify(X_API_Key=key) for key in (KEY, NEW_KEY) * 5]
    assert [answer.status for answer in answers[:6]] == [200] * 6
    refused = answers[-1]
    assert (refused.status, refused.error) == (429, "RateLimitError")
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert keyed.classify(X_API_Key=OTHER).status == 200
    assert "for helpdesk" in keyed.log


def test_keys_never_appear_in_logs_or_metrics(keyed: ServiceProcess) -> None:
    """Neither right nor wrong ones."""
    keyed.classify(X_API_Key="wrong-key-0123456789")
    everything = keyed.log + keyed.get("/metrics", {"X-API-Key": OTHER}).body.decode()
    for key in (KEY, NEW_KEY, OTHER, "wrong-key"):
        assert key not in everything


def test_pages_switched_off_return_404_and_foreign_hosts_421(tmp_path: Path) -> None:
    """404, as for any path that is not there; also without keys."""
    off = {"API_EXPOSE_DOCS": "off", "API_EXPOSE_METRICS": "off"}
    with serve(tmp_path, app=WITH_PHRASES, API_EMBEDDED="true", **off) as service:
        for path in ("/docs", "/openapi.json", "/metrics", "/docs/assets/swagger-ui.css"):
            assert (service.get(path).status, service.get(path).error) == (404, "NotFoundError")
        # A page that calls this machine by its own name (DNS rebinding) is not answered without keys.
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
            answer = service.request("GET", "/ready", headers={"Host": host})
            assert (answer.status, answer.error) == (421, "MisdirectedRequestError")
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.2:1", "[::1]:8000"):
            assert service.request("GET", "/ready", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "start",
    [pytest.param(("-m", "uvicorn", "main:app"), marks=pytest.mark.thorough), ("main.py",)],
    ids=["uvicorn", "main.py"],
)
def test_start_fails_on_an_outside_address_without_keys(tmp_path: Path, start: tuple[str, ...]) -> None:
    """One sentence that names the settings, and no listening socket."""
    command = MAIN if start == ("main.py",) else start
    ended = run_to_the_end(tmp_path, *command, "--host", OUTSIDE, "--port", str(free_port()), **NO_MODEL)
    assert ended.returncode == (2 if start == ("main.py",) else 3)  # 3 is uvicorn's
    assert (
        "API_KEYS is empty: set API_KEYS, listen on 127.0.0.1, or set API_ALLOW_UNAUTHENTICATED=true." in ended.stderr
    )
    assert "Traceback" not in ended.stderr
    assert "running on" not in ended.stderr


@pytest.mark.parametrize("settings", [{"API_KEYS": KEYS}, {"API_ALLOW_UNAUTHENTICATED": "true"}], ids=["keys", "said"])
def test_service_listens_outside_with_keys_or_explicit_permission(tmp_path: Path, settings: dict[str, str]) -> None:
    """And then any host name is answered. With uvicorn's --root-path, pages need a key and have relative links as well."""
    settings = {**settings, "API_EXPOSE_DASHBOARD": "key" if "API_KEYS" in settings else "off"}
    with serve(tmp_path, "--host", OUTSIDE, "--root-path", "/triad", **NO_MODEL, **settings) as service:
        assert service.request("GET", "/health", headers={"Host": "triad.example"}).status == 200
        if "API_KEYS" in settings:
            for path in ("/metrics", "/dashboard", "/dashboard/labels", "/openapi.json", "/nowhere/metrics"):
                assert service.get(path).status == (404 if path == "/nowhere/metrics" else 401)
            page = service.get("/dashboard/labels", {"X-API-Key": KEY}).body
            assert b'href="../dashboard/dashboard.css"' in page


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"API_KEYS": "helpdesk:short-SECRET"}, "API_KEYS"),
        ({"TAXONOMY_FILE": "missing.yaml"}, "TAXONOMY_FILE"),
        pytest.param({"OLLAMA_MODEL": "gpt-oss:120b-cloud"}, "cloud", marks=pytest.mark.thorough),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_setting_fails_the_start_with_one_sentence(
    tmp_path: Path, variables: dict[str, str], named: str
) -> None:
    """It is named, and its value, which may be a secret, is not shown. Exit code 2 of main.py tells systemd not to repeat it."""
    program = MAIN if named == "TAXONOMY_FILE" else ("-m", "uvicorn", "main:app")
    ended = run_to_the_end(tmp_path, *program, "--port", str(free_port()), **variables)
    assert ended.returncode == (2 if program is MAIN else 3)
    assert named in ended.stderr
    assert "SECRET" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.thorough
def test_env_file_may_hold_settings_of_worker_and_service(tmp_path: Path) -> None:
    """One .env for the worker and the service; an unknown name in it is an error."""
    (tmp_path / ".env").write_text("API_EMBEDDED=true\nAPI_MAX_MESSAGES=1\nBATCH_SIZE=7\n", encoding="utf-8")
    with serve(tmp_path) as service:
        message = {"sender": "customer", "text": "a"}
        assert service.classify({"conversation_number": "1", "messages": [message]}).status == 200
        assert service.classify({"conversation_number": "1", "messages": [message, message]}).status == 422
    (tmp_path / ".env").write_text("API_MAX_MESAGES=1\n", encoding="utf-8")
    ended = run_to_the_end(tmp_path, "-m", "uvicorn", "main:app", "--port", str(free_port()))
    assert "did you mean API_MAX_MESSAGES" in ended.stderr
