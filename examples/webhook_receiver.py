"""Receives webhooks of a help desk, classifies each conversation with the service, and shows the labels or writes them back.

zendesk_webhook.py and intercom_webhook.py use it. It answers at once, because help desks wait only a few seconds, and
classifies afterwards. A webhook that is lost in a crash is no loss for reports: the batch worker classifies all conversations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import uvicorn
from fastapi import BackgroundTasks, FastAPI, Request, Response
from fastapi.telemetry import TelemetryConfig
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.util import Retry

MAX_BODY_BYTES = 1_000_000
TIMEOUT_S = 70  # of one call; longer than API_REQUEST_TIMEOUT_S
# Retry-After is obeyed. A repeated POST is safe: the service knows the Idempotency-Key.
RETRY = Retry(total=5, backoff_factor=1, status_forcelist=[429, 502, 503, 504], allowed_methods=None)

# FastAPI would record paths and messages of exceptions, which may hold what was sent.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}

Json = dict[str, Any]


@dataclass(frozen=True)
class HelpDesk:
    """The differences between help desks.

    *is_genuine* verifies the signature of headers and body with a secret. *conversation_of* returns the body for
    ``POST /classify``, None if the event is of no interest. *labels_request* returns the path and the body of the PUT that
    writes labels back.
    """

    name: str
    api_url: str
    is_genuine: Callable[[bytes, Mapping[str, str], bytes], bool]
    conversation_of: Callable[[Json], Json | None]
    labels_request: Callable[[str, Mapping[str, Any]], tuple[str, Json]]
    authentication: Callable[[str, str], AuthBase]


class Bearer(AuthBase):
    """Authentication with a token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the header."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def create_app(desk: HelpDesk, arguments: argparse.Namespace) -> FastAPI:
    """Return the receiver: ``POST /webhook``."""
    app, session = FastAPI(openapi_url=None, telemetry=NO_TELEMETRY), requests.Session()
    session.mount("http", HTTPAdapter(max_retries=RETRY))
    secret = _first_line(arguments.secret_file).encode()

    @app.head("/webhook")
    def check() -> Response:
        return Response()

    @app.post("/webhook")
    async def receive(request: Request, tasks: BackgroundTasks) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return Response(status_code=413)
        if not desk.is_genuine(secret, request.headers, bytes(body)):
            return Response(status_code=401)
        try:
            payload = json.loads(body)
            conversation = desk.conversation_of(payload)
            event_id = str(payload["id"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return Response(status_code=422)  # genuine, but not in the documented form
        if conversation is not None:
            tasks.add_task(label, desk, arguments, session, event_id, conversation)
        return Response(status_code=200)

    return app


def label(
    desk: HelpDesk, arguments: argparse.Namespace, session: requests.Session, event_id: str, conversation: Json
) -> None:
    """Classify *conversation*, print its labels, and write them back with ``--write``; texts are never printed."""
    number = conversation["conversation_number"]
    headers = {"Idempotency-Key": f"{desk.name}-{event_id}"[:255]}
    if arguments.api_key_file:
        headers["X-API-Key"] = _first_line(arguments.api_key_file)
    try:
        answer = session.post(f"{arguments.service}/classify", json=conversation, headers=headers, timeout=TIMEOUT_S)
        answer.raise_for_status()
        labels = answer.json()["classification"]
        labels.pop("categorization", None)  # a sentence of the model, which may repeat what the customer wrote
        print(f"{desk.name} {number}: {json.dumps(labels)}", flush=True)
        path, change = desk.labels_request(number, labels)
        url = f"{arguments.vendor_url}{path}"
        if not arguments.write:
            print(f"dry run, --write would send: PUT {url} {json.dumps(change)}", flush=True)
            return
        authentication = desk.authentication(arguments.user, _first_line(arguments.token_file))
        session.put(url, json=change, auth=authentication, timeout=TIMEOUT_S).raise_for_status()
        print(f"{desk.name} {number}: labels written", flush=True)
    except requests.RequestException as exc:
        status = "no answer" if exc.response is None else f"HTTP {exc.response.status_code}"
        print(f"{desk.name} {number}: failed, {type(exc).__name__}, {status}", flush=True)


def run(desk: HelpDesk, argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=f"Classify conversations of {desk.name} webhooks.", allow_abbrev=False)
    parser.add_argument("--secret-file", type=Path, required=True, help="secret that signs the webhooks")
    parser.add_argument("--service", default="http://127.0.0.1:8000", help="address of the service (%(default)s)")
    parser.add_argument("--api-key-file", type=Path, help="API key of the service")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port (%(default)s); put a proxy with TLS before it")
    parser.add_argument("--write", action="store_true", help="write the labels back; without it they are only shown")
    parser.add_argument("--vendor-url", default=desk.api_url, help="address of the help desk's API (%(default)s)")
    parser.add_argument("--user", default="", help="user of the API token, if the help desk needs one")
    parser.add_argument("--token-file", type=Path, help="API token of the help desk, for --write")
    arguments = parser.parse_args(argv)
    if arguments.write and not arguments.token_file:
        parser.error("--write needs --token-file")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(create_app(desk, arguments), host=arguments.host, port=arguments.port, log_level="warning")


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].strip()
