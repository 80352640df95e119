"""The REST service: ``uvicorn main:app --host 127.0.0.1 --port 8000``, or ``python main.py``. docs/service.md explains it."""

from __future__ import annotations

import argparse
import gc
import hashlib
import logging
import re
import resource
import sys
import time
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.telemetry import TelemetryConfig
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

import api
from config import Settings, load_settings
from config.service_settings import ServiceSettings, load_service_settings
from embedding_index.similar import OpenIndex, SimilarConversations, open_index
from embedding_index.similar_contract import SimilarRequest, SimilarResponse, parse_query, parse_search
from error_handler import ConfigurationError, ExitCode, RequestError, TriadError
from logger import (
    REQUEST_ID_HEADER,
    RequestIdFilter,
    TracebackRedactor,
    adopt_server_logs,
    configure_logging,
    request_id,
)
from service import docs_page
from service import errors as service_errors
from service.access import CLASSIFY, DOCS, HEALTH, METRICS, OPENAPI, READY, SIMILAR, ServiceGate
from service.admission import cancel_on_disconnect
from service.body_limits import BodyReader, read_json_object
from service.idempotency import IdempotencyStore
from service.metrics import CONTENT_TYPE, ServiceMetrics
from service.middleware import ServiceMiddleware
from service.openapi_document import build_openapi
from service.slow_clients import GuardLimits, SlowClientGuard, server_config
from service.turnstile import Turnstile
from utils.network import inherited_host, require_keys_outside_this_machine

logger = logging.getLogger(__name__)

VERSION = "1.0.0"
# FastAPI's own traces hold paths, and its records the messages of exceptions: what callers sent.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
MAX_OPEN_FILES = 65_536
FILES_OF_OUR_OWN = 64  # logs, the listening socket, the event loop, and some

_IDEMPOTENCY_KEY = re.compile(rb"[!-~](?:[ -~]{0,253}[!-~])?")
_HEADER_SAFE = re.compile(r"[^!-~]")

AllSettings = tuple[Settings, ServiceSettings]


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need while the service runs."""

    settings: ServiceSettings
    model: api.ModelService
    similar: SimilarConversations
    bodies: BodyReader
    turnstile: Turnstile
    answers: IdempotencyStore[api.Verdict]
    metrics: ServiceMetrics
    openapi: bytes


class ServiceApp(FastAPI):
    """Knows the server that runs it, and tells it in one sentence why it does not start."""

    server_config: uvicorn.Config | None = None
    problem: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan."""
        if scope["type"] != "lifespan":
            await super().__call__(scope, receive, send)
            return

        async def send_sentence(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and self.problem:
                message["message"] = self.problem  # Starlette makes a traceback of it
            await send(message)

        self.server_config = server_config(receive)
        await super().__call__(scope, receive, send_sentence)


async def classify(request: Request) -> Response:
    """POST /classify: label one conversation."""
    service, state = _service(request), request.scope["state"]
    headers = state["headers"]
    key = _idempotency_key(headers.get(b"idempotency-key"))
    if key is None:  # a kept answer needs no room
        service.model.require_room()
    await service.turnstile.enter()
    with service.bodies.hold() as hold:
        body = await service.bodies.read(hold, headers, request.receive)
        fields = read_json_object(body)
        conversation = api.parse_request(fields, service.settings)
        deadline = _deadline(service, state)

        async def ask() -> api.Verdict:
            return await service.model.classify(conversation, deadline)

        if key is None:
            verdict, replayed = await cancel_on_disconnect(ask(), request.receive), False
        else:
            fingerprint = hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).digest()
            kept = service.answers.answer((state["caller"], key), fingerprint, ask)
            verdict, replayed = await cancel_on_disconnect(kept, request.receive)
        state["note"] = _note(verdict, replayed)
        answer = {
            "conversation_number": fields["conversation_number"],
            "messages": fields["messages"],
            "classification": verdict.labels,
        }
        answer_headers = {"X-Model": _HEADER_SAFE.sub("", verdict.model)}
        if not verdict.is_complete:
            answer_headers["X-Input-Complete"] = "false"
        if replayed:
            answer_headers["Idempotency-Replayed"] = "true"
        return Response(orjson.dumps(answer), media_type="application/json", headers=answer_headers)


async def similar(request: Request) -> Response:
    """GET and POST /similar: past conversations like a text."""
    service, state = _service(request), request.scope["state"]
    service.similar.require_room()
    await service.turnstile.enter()
    if request.method == "POST":
        with service.bodies.hold() as hold:
            body = await service.bodies.read(hold, state["headers"], request.receive)
            wanted = parse_search(read_json_object(body), service.settings)
    else:
        wanted = parse_query(request.scope["query_string"], service.settings)
    search = service.similar.find(wanted, _deadline(service, state))
    found = await cancel_on_disconnect(search, request.receive)
    state["note"] = f", waited {found.queue_s * 1000:.0f} ms, search {found.search_s * 1000:.0f} ms"
    return Response(orjson.dumps(found.response.model_dump()), media_type="application/json")


def _deadline(service: Service, state: dict[str, Any]) -> float:
    spent_s: float = time.monotonic() - state["started_at"]
    return get_running_loop().time() + service.settings.request_timeout_s - spent_s


def _idempotency_key(value: bytes | None) -> str | None:
    if value is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(value):
        raise RequestError(service_errors.BAD_HEADER)
    return value.decode()


def _note(verdict: api.Verdict, replayed: bool) -> str:
    if replayed:
        return ", kept answer"
    return f", waited {verdict.queue_s * 1000:.0f} ms, model {verdict.model_s * 1000:.0f} ms"


async def health(_request: Request) -> Response:
    """GET /health: alive; asks nobody."""
    return Response(b'{"status":"ok"}', media_type="application/json")


async def ready(request: Request) -> Response:
    """GET /ready: the model server answers and has the model."""
    model = _service(request).model
    problem = await model.check()
    if problem is not None:
        raise RequestError(problem, retry_after_s=service_errors.UNAVAILABLE_RETRY_AFTER_S)
    return Response(orjson.dumps({"status": "ready", "model": model.model}), media_type="application/json")


async def metrics(request: Request) -> Response:
    """GET /metrics: the numbers in Prometheus text."""
    return Response(_service(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return Response(_service(request).openapi, media_type="application/json")


async def docs(_request: Request) -> Response:
    """GET /docs: Swagger UI."""
    headers = {"Content-Security-Policy": docs_page.CONTENT_SECURITY_POLICY}
    return Response(docs_page.PAGE, media_type="text/html", headers=headers)


async def docs_start(_request: Request) -> Response:
    """GET /docs/start.js: what the page runs."""
    return Response(docs_page.START_SCRIPT, media_type="text/javascript")


def _service(request: Request) -> Service:
    service: Service = request.scope["state"]["service"]
    return service


async def _no_such_route(_request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 404
    kind = service_errors.METHOD_NOT_ALLOWED if status == 405 else service_errors.NOT_FOUND
    headers = getattr(exc, "headers", None)
    return Response(orjson.dumps(RequestError(kind).body), kind.status, headers, "application/json")


async def _internal_error(_request: Request, _exc: Exception) -> Response:
    headers = {REQUEST_ID_HEADER: request_id.get() or ""}
    body = orjson.dumps(RequestError(service_errors.INTERNAL).body)
    return Response(body, service_errors.INTERNAL.status, headers, "application/json")


def create_app(load: Callable[[], AllSettings] | None = None, open_search: OpenIndex = open_index) -> ServiceApp:
    """Return the application; *load* reads the settings when it starts, None from the environment.

    *open_search* opens the index of past conversations at the first request that asks for it.
    """

    @asynccontextmanager
    async def lifespan(app: ServiceApp) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            try:
                state = await _start((load or _load)(), app.server_config, stack, open_search)
            except TriadError as exc:
                app.problem = str(exc)
                raise
            yield state

    app = ServiceApp(lifespan=lifespan, openapi_url=None, redirect_slashes=False, telemetry=NO_TELEMETRY)
    app.add_middleware(ServiceMiddleware)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(404, _no_such_route)
    app.add_exception_handler(405, _no_such_route)
    app.add_exception_handler(Exception, _internal_error)
    # Plain routes: these functions read the request themselves, so FastAPI's search for parameters would find none.
    app.add_route(CLASSIFY, classify, methods=["POST"])
    app.add_route(SIMILAR, similar, methods=["GET", "POST"])
    routes = {
        HEALTH: health,
        READY: ready,
        METRICS: metrics,
        OPENAPI: openapi,
        DOCS: docs,
        f"{DOCS}/start.js": docs_start,
    }
    for path, route in routes.items():
        app.add_route(path, route, methods=["GET"])
    app.mount(docs_page.ASSETS_PATH, StaticFiles(directory=docs_page.assets_folder()))
    return app


def _load() -> AllSettings:
    return load_settings(), load_service_settings()


async def _start(
    given: AllSettings, config: uvicorn.Config | None, stack: AsyncExitStack, open_search: OpenIndex
) -> dict[str, Any]:
    """Open everything that a running service needs, and return the state that requests get."""
    settings, service_settings = given
    _configure_logs(settings, service_settings)
    if config is None:
        logger.warning(
            "this server cannot be guarded against slow clients, nor its address be checked; start uvicorn as usual"
        )
    _require_safe_address(config, service_settings)
    numbers = ServiceMetrics()
    gate = ServiceGate(service_settings)
    model = await stack.enter_async_context(api.ModelService(settings, service_settings, numbers))
    searches = SimilarConversations(service_settings, numbers, model.deadlines, open_search)
    stack.push_async_callback(searches.close)

    def stop(grace_s: float) -> None:
        logger.info("stopping: requests in hand have %.1f s to finish", grace_s)
        gate.stopping = True
        model.deadlines.stop(grace_s)

    if config is not None:
        limit = _raise_open_files() - FILES_OF_OUR_OWN - service_settings.max_concurrent
        limits = GuardLimits(
            service_settings.header_timeout_s,
            service_settings.body_timeout_s,
            settings.shutdown_grace_s,
            max(16, limit),
        )
        guard = SlowClientGuard(config, limits, stop)
        guard.start()
        stack.push_async_callback(guard.close)
    service = Service(
        settings=service_settings,
        model=model,
        similar=searches,
        bodies=BodyReader(service_settings.max_body_bytes, service_settings.body_timeout_s),
        turnstile=Turnstile(),
        answers=IdempotencyStore(service_settings.idempotency_retention_s, service_settings.idempotency_max_keys),
        metrics=numbers,
        openapi=orjson.dumps(openapi_document(service_settings)),
    )
    gc.collect()
    gc.freeze()  # what is there now stays; looking through it again and again made pauses of tens of milliseconds
    return {"service": service, "gate": gate, "metrics": numbers}


def openapi_document(settings: ServiceSettings) -> dict[str, Any]:
    """Return the OpenAPI document of a service with *settings*."""
    models = [
        (api.ClassificationRequest, "validation"),
        (api.ClassificationResponse, "validation"),
        (api.ErrorResponse, "validation"),
        (SimilarRequest, "validation"),
        (SimilarResponse, "validation"),
    ]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return build_openapi(definitions["$defs"], settings, VERSION)


def _configure_logs(settings: Settings, service_settings: ServiceSettings) -> None:
    secrets = [key for _, key in service_settings.named_keys]
    if settings.llm_api_key:
        secrets.append(settings.llm_api_key.get_secret_value())
    configure_logging(settings.log_level, secrets=secrets)
    adopt_server_logs()
    for handler in logging.getLogger().handlers:
        handler.addFilter(TracebackRedactor())
        handler.addFilter(RequestIdFilter())


def _require_safe_address(config: uvicorn.Config | None, settings: ServiceSettings) -> None:
    if config is None:
        host = None
    elif config.fd is not None:
        host = inherited_host(config.fd)
    else:
        host = "localhost" if config.uds is not None else config.host
    require_keys_outside_this_machine(host, settings)


def _raise_open_files() -> int:
    """Allow as many open files, connections among them, as the system lets this process have; return the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; *argv* None means that of the process. Returns an exit code of docs/operations.md."""
    parser = argparse.ArgumentParser(
        prog="main.py", description="The REST service; docs/service.md says more.", allow_abbrev=False
    )
    parser.add_argument("--host", help="address to listen on (API_HOST; 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (API_PORT; 8000)")
    parser.add_argument(
        "--embedded", action="store_true", default=None, help="answer with the built-in baseline (API_EMBEDDED)"
    )
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
        service_settings = load_service_settings(**vars(arguments))
        require_keys_outside_this_machine(service_settings.host, service_settings)
    except ConfigurationError as exc:
        sys.stderr.write(f"main.py: {exc}\n")
        return exc.exit_code
    application = create_app(lambda: (settings, service_settings))
    uvicorn.run(application, host=service_settings.host, port=service_settings.port, log_config=None, access_log=False)
    return ExitCode.DONE


app = create_app()

if __name__ == "__main__":
    sys.exit(main())
