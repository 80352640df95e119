"""The REST service: ``uvicorn main:app --host 127.0.0.1 --port 8000`` or ``python main.py``. See docs/service.md."""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import gc
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.types import Message, Receive, Scope, Send

from config import Settings, load_settings
from config.service_settings import ServiceSettings, load_service_settings
from domain.conversation import PROCESSOR_VERSION
from error_handler import ConfigurationError, ExitCode, TriadError
from network.addresses import require_keys_outside_this_machine
from service.access import DASHBOARD
from service.dashboard_labels import dashboard_labels
from service.dashboard_quarantine import dashboard_quarantine
from service.dashboard_review import dashboard_review
from service.dashboard_routes import dashboard
from service.dashboard_runs import dashboard_runs
from service.job_routes import jobs
from service.middleware import ServiceMiddleware, add_error_handlers
from service.openapi import openapi_document
from service.review_routes import review, review_page
from service.routes import add_classification, documentation, operations, similarity
from service.similar import OpenIndex, open_index
from service.slow_clients import server_config
from service.startup import start
from service.taxonomy_routes import labels
from utils.process import Parser, tune_garbage_collection

# FastAPI's own traces contain paths, and its records contain exception messages: text that callers sent.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


class ServiceApp(FastAPI):
    """A FastAPI that has the configuration of its uvicorn, and reports a failed start in one sentence."""

    server_config: uvicorn.Config | None = None
    problem: TriadError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan."""
        if scope["type"] != "lifespan":
            # uvicorn --root-path puts the prefix of a proxy before each path. The gate needs the path of the route, and links
            # are relative.
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            await super().__call__({**scope, "path": path, "root_path": ""}, receive, send)
            return

        async def send_sentence(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and self.problem:
                message["message"] = str(self.problem)
            await send(message)

        self.server_config = server_config(receive)
        await super().__call__(scope, receive, send_sentence)


def create_app(
    given: tuple[Settings, ServiceSettings] | None = None, open_search: OpenIndex = open_index
) -> ServiceApp:
    """Return the application.

    Args:
        given: None reads the settings from the environment when the application starts.
        open_search: Opens the embedding index at the first search.
    """

    @asynccontextmanager
    async def lifespan(app: ServiceApp) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            try:
                settings, service_settings = given or (load_settings(), load_service_settings())
                service = await start(settings, service_settings, app.server_config, open_search, stack)
            except TriadError as exc:
                app.problem = exc
                raise
            has_sentence = settings.reply_style == "full"
            document = orjson.dumps(
                openapi_document(app, service_settings, service.model.taxonomy, has_sentence=has_sentence)
            )
            gc.collect()  # before the rest is exempted, or its garbage would stay
            tune_garbage_collection()
            yield {"service": service, "openapi": document}

    app = ServiceApp(
        title="Customer Support Triad",
        version=PROCESSOR_VERSION,
        description="Classifies one support conversation at a time: intent, topic and sentiment. Durations are in seconds.",
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(ServiceMiddleware)
    add_error_handlers(app)
    add_classification(app)
    tabs = (dashboard, dashboard_runs, dashboard_labels, dashboard_review, dashboard_quarantine)
    for router in (labels, jobs, similarity, review, review_page, *tabs, operations, documentation):
        app.include_router(router)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT and return an exit code of docs/operations.md; *argv* None reads the command line."""
    parser = Parser(prog="main.py", description="Run the REST service. See docs/service.md.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"customer-support-triad {PROCESSOR_VERSION}")
    parser.add_argument("--host", help="address to listen on (API_HOST; 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (API_PORT; 8000)")
    parser.add_argument(
        "--embedded", action="store_true", default=None, help="answer with a built-in classifier (API_EMBEDDED)"
    )
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
        service_settings = load_service_settings(**vars(arguments))
        require_keys_outside_this_machine(service_settings.host, service_settings)
    except ConfigurationError as exc:
        sys.stderr.write(f"main.py: {exc}\n")
        return exc.exit_code
    application = create_app((settings, service_settings))
    sys.stderr.write(f"{_dashboard_address(service_settings)}\n")
    try:
        uvicorn.run(
            application, host=service_settings.host, port=service_settings.port, log_config=None, access_log=False
        )
    except SystemExit:  # uvicorn's own code of a failed start means another thing to a service manager
        if application.problem is not None:
            return application.problem.exit_code
        sys.stderr.write(
            "main.py: The service cannot start; the error above says why. If its address is in use, choose another --port.\n"
        )
        return ExitCode.CONFIGURATION
    return ExitCode.DONE


def _dashboard_address(settings: ServiceSettings) -> str:
    if settings.expose_dashboard == "off":
        return "Dashboard: off. API_EXPOSE_DASHBOARD=key switches it on (docs/dashboard.md)."
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - as a browser calls it
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{settings.port or 'PORT'}{DASHBOARD}"
    login = " (the browser asks for a password: the API key, with any user name)" if settings.keys else ""
    return f"Dashboard: {address}{login}"


app = create_app()

if __name__ == "__main__":
    sys.exit(main())
