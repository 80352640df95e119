"""Webhooks of jobs: signed, at least once, to allowed origins only; and the example that receives them."""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database
from standardwebhooks import Webhook

from config.service_settings import load_service_settings
from error_handler import ConfigurationError, JobValidationError
from network.guarded_resolver import GuardedResolver, is_allowed
from service.webhooks import url_pattern
from tests.fakes.webhook_receiver import receiving, status
from tests.service.service_process import WITH_PHRASES, ServiceProcess, free_port, serve
from tests.service.test_jobs import HEADS, item, post, until

ROOT = Path(__file__).parents[2]
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
Data = Database[dict[str, Any]]


@pytest.fixture
def site(mongodb_uri: str, db_name: str, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that starts a service with the secret, on the database of the test."""

    @contextmanager
    def start(origin: str) -> Iterator[ServiceProcess]:
        hooks = {"API_WEBHOOK_ORIGINS": f"https://hooks.example.com,{origin}", "API_WEBHOOK_SECRET": SECRET}
        address = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": db_name, "API_EMBEDDED": "true"}
        with serve(tmp_path, app=WITH_PHRASES, **address, **hooks) as service:
            yield service

    return start


def test_webhook_is_signed_and_repeated_until_it_is_received(site: Callable[..., Any], database: Data) -> None:
    """An independent library accepts the signature; each attempt has the same id; the log has no path of the URL."""
    with receiving(status(500), status(307, Location="/elsewhere"), status(204)) as receiver:
        url = f"{receiver.url}/secret-path?token=1"
        with site(receiver.url.removesuffix("/hook")) as service:
            silent = {"conversation_number": "2", "messages": [{"sender": "agent", "text": "Hello?"}]}
            job = post(service, item(1), silent, webhook=url).json
            assert job["webhook"] == "pending"
            until(lambda: len(receiver.received) == 1)
            for seen in (1, 2):  # the next attempt is due now
                until(lambda seen=seen: _due(database)["attempts"] >= seen and _due(database).get("next_at"))
                database[HEADS].update_one({}, {"$set": {"webhook.next_at": datetime.now(UTC)}})
                until(lambda seen=seen: len(receiver.received) > seen)
            until(lambda: service.get(f"/jobs/{job['job']}").json["webhook"] == "delivered")
            assert service.metric('triad_webhooks_total{outcome="delivered"}') == 1
            assert "secret-path" not in service.log
        assert {headers["webhook-id"] for headers, _ in receiver.received} == {f"job_{job['job']}"}
        for headers, body in receiver.received:
            message = Webhook(SECRET).verify(body, headers)
            assert message["type"] == "job.done"
            assert message["data"] == {"job": job["job"], "total": 2, "succeeded": 1, "failed": 1}
            datetime.fromisoformat(message["timestamp"])
            assert b"parcel" not in body
        assert len(receiver.received) == 3
        assert _due(database)["attempts"] == 3  # a redirect is a failed attempt


def _due(database: Data) -> dict[str, Any]:
    return dict((database[HEADS].find_one() or {})["webhook"])


@pytest.mark.thorough
def test_receiver_that_is_gone_gets_no_other_attempt(site: Callable[..., Any]) -> None:
    with receiving(status(410)) as receiver, site(receiver.url.removesuffix("/hook")) as service:
        job = post(service, item(1), webhook=receiver.url).json["job"]
        until(lambda: service.get(f"/jobs/{job}").json["webhook"] == "failed")
        assert len(receiver.received) == 1
        assert service.metric('triad_webhooks_total{outcome="failed"}') == 1


def test_webhook_whose_origin_is_not_allowed_any_more_is_not_sent(site: Callable[..., Any], database: Data) -> None:
    """The settings of now count, not those of the time when the job was accepted."""
    with receiving() as receiver, site(receiver.url.removesuffix("/hook")) as service:
        job = {"_id": "1" * 32, "caller": "anonymous", "state": "done", "total": 0, "finished_at": datetime.now(UTC)}
        times = {"created_at": datetime.now(UTC), "expires_at": datetime(2100, 1, 1, tzinfo=UTC)}
        webhook = {"url": "http://127.0.0.1:1/hook", "state": "pending", "attempts": 0}
        database[HEADS].insert_one({**job, **times, "webhook": webhook})
        until(lambda: _due(database)["state"] == "failed")
        assert not receiver.received
        assert "not in API_WEBHOOK_ORIGINS any more" in service.log


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        *(("93.184.216.34", True), ("10.0.0.5", True), ("fd00::5", True), ("2606:2800:220:1::1", True)),
        *(("127.0.0.1", False), ("::1", False), ("0.0.0.0", False), ("169.254.169.254", False), ("fe80::1", False)),
        *(("fd00:ec2::254", False), ("100.100.100.200", False), ("224.0.0.1", False)),
        *(
            ("::ffff:127.0.0.1", False),
            ("::ffff:169.254.169.254", False),
            ("64:ff9b::7f00:1", False),
            ("2002:7f00:1::", False),
        ),
    ],
)
def test_name_may_not_lead_to_this_machine_or_to_credentials(address: str, allowed: bool) -> None:
    """Also inside an IPv6 address. Private networks are the operator's."""
    assert is_allowed("hooks.example", ipaddress.ip_address(address)) is allowed


async def test_resolver_refuses_a_name_of_this_machine() -> None:
    """The system's resolver knows 127.1, which is no address for a URL. This machine has its own name."""
    with pytest.raises(JobValidationError):
        await GuardedResolver().resolve("127.1")
    assert await GuardedResolver().resolve("localhost")


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://hooks.example.com", True),
        ("https://hooks.example.com/a/b?c=d&e=%20", True),
        ("http://10.0.0.5:9000/x", True),
        ("https://hooks.example.com?x=@y", True),
        ("http://hooks.example.com/", False),
        ("https://hooks.example.com:444/", False),
        ("https://hooks.example.com.evil.org/", False),
        ("https://hooks.example.com@evil.org/", False),
        ("https://hooks.example.com:x@evil.org/", False),
        ("https://hooks.example.com\\@evil.org/", False),
        ("https://hooks.example.com/\\evil", False),
        ("https://hooks.example.com#@evil.org", False),
        ("https://hooks.example.com/a b", False),
        ("https://hooks.example.com/a\n", False),
        ("https://HOOKS.example.com/", False),
        ("https://hooksXexample.com/", False),
        ("http://169.254.169.254/", False),
        ("file:///etc/passwd", False),
    ],
)
def test_only_urls_of_an_allowed_origin_are_allowed(url: str, is_allowed: bool) -> None:
    """The host cannot be read in two ways, because the URL begins with the origin and goes on with / or ?."""
    pattern = url_pattern(["https://hooks.example.com", "http://10.0.0.5:9000"])
    assert bool(re.fullmatch(pattern, url)) is is_allowed


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"webhook_origins": "https://a.b"}, "API_WEBHOOK_ORIGINS: needs API_WEBHOOK_SECRET"),
        ({"webhook_origins": "https://a.b/path", "webhook_secret": SECRET}, "API_WEBHOOK_ORIGINS: must be"),
        ({"webhook_origins": "https://user@a.b", "webhook_secret": SECRET}, "API_WEBHOOK_ORIGINS: must be"),
        ({"webhook_origins": "https://a.b,", "webhook_secret": SECRET}, "API_WEBHOOK_ORIGINS: must be"),
        ({"webhook_secret": "whsec_c2hvcnQ="}, "API_WEBHOOK_SECRET: must be whsec_"),
        ({"webhook_secret": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="}, "API_WEBHOOK_SECRET: must be whsec_"),
    ],
)
def test_wrong_webhook_settings_are_named_without_their_value(settings: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        load_service_settings(None, **settings)
    assert "c2hvcnQ" not in str(caught.value)
    assert "MDEy" not in str(caught.value)


def test_example_receives_a_webhook_and_refuses_a_forged_one(site: Callable[..., Any], tmp_path: Path) -> None:
    """examples/receive_job_webhook.py, as docs/service.md shows it."""
    port, secret = free_port(), tmp_path / "secret"
    secret.write_text(SECRET)
    command = [sys.executable, str(ROOT / "examples/receive_job_webhook.py"), str(port), str(secret)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            with site(f"http://127.0.0.1:{port}") as service:
                job = post(service, item(1), webhook=f"http://127.0.0.1:{port}/").json["job"]
                assert receiver.stdout is not None
                assert receiver.stdout.readline() == f"job {job}: 1 of 1 labelled\n"
                forged = ServiceProcess(service.process, port, service.log_path)
                silent = forged.connect()  # one that sends nothing does not keep the others waiting
                signed = {"webhook-id": "a", "webhook-timestamp": str(int(datetime.now(UTC).timestamp()))}
                for signature in ("", "v1,AAAA", "v1,"):
                    answer = forged.request("POST", "/", b"{}", {**signed, "webhook-signature": signature})
                    assert answer.status == 400
                silent.close()
        finally:
            receiver.kill()
