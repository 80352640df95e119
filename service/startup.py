"""Start-up of the service: logs, address check, open files, the model, and the parts that the routes share."""

from __future__ import annotations

import logging
import os
import resource
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass

import uvicorn

from config import Settings
from config.service_settings import ServiceSettings
from logger import RequestIdFilter, TracebackRedactor, adopt_server_logs, configure_logging
from network.addresses import require_keys_outside_this_machine
from service.access import BATCH, CLASSIFY, SIMILAR, ServiceGate
from service.admission import IdempotencyStore
from service.body_limits import BodyLimits
from service.dashboard import Dashboard, open_dashboard
from service.jobs import JobService, open_jobs
from service.lease import lease_while_busy
from service.metrics import ServiceMetrics
from service.model import ModelService, Verdict
from service.review import ReviewService, open_review
from service.similar import OpenIndex, SimilarConversations
from service.slow_clients import SlowClientGuard

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 65_536
RESERVED_FILES = 64  # logs, the listening socket, the event loop


@dataclass(frozen=True, slots=True)
class Service:
    """The objects that the middleware and the routes share while the service runs."""

    settings: ServiceSettings
    metrics: ServiceMetrics
    gate: ServiceGate
    bodies: BodyLimits
    model: ModelService
    answers: IdempotencyStore[Verdict]
    similar: SimilarConversations
    review: ReviewService | None
    dashboard: Dashboard | None
    jobs: JobService | None


async def start(
    settings: Settings,
    service_settings: ServiceSettings,
    config: uvicorn.Config | None,
    open_search: OpenIndex,
    stack: AsyncExitStack,
) -> Service:
    """Open everything that the service needs; *stack* closes it.

    *config* is that of the running uvicorn; None for another server.

    Raises:
        ConfigurationError: A setting is wrong, or the address needs API keys.
    """
    _configure_logs(settings, service_settings)
    if config is None:
        logger.warning(
            "this server gives no protection against slow clients and hides its address; run it with uvicorn"
        )
    require_keys_outside_this_machine(_host(config), service_settings)
    metrics, gate = ServiceMetrics(), ServiceGate(service_settings)
    model = ModelService(settings, service_settings, metrics)
    await stack.enter_async_context(model.running())
    if settings.service_lease and not service_settings.embedded:
        await stack.enter_async_context(lease_while_busy(settings, model.slots))
    similar = SimilarConversations(service_settings, metrics, model.deadlines, open_search, model.taxonomy)
    stack.push_async_callback(similar.close)

    def stop(grace_s: float) -> None:
        logger.info("stopping: running requests have %.1f s to finish", grace_s)
        gate.stopping = True
        model.deadlines.stop(grace_s)

    if config is not None:
        max_connections = max(16, _raise_open_files() - RESERVED_FILES - model.slots.size)
        guard = SlowClientGuard(config, service_settings, settings.shutdown_grace_s, max_connections, stop)
        await stack.enter_async_context(guard.run())
    bodies = BodyLimits(
        service_settings,
        {CLASSIFY: model.require_room, BATCH: model.require_room, SIMILAR: similar.slots.require_room},
    )
    review = None if service_settings.expose_review == "off" else await open_review(settings, model.deadlines, stack)
    dashboard = open_dashboard(settings, service_settings, model.deadlines, stack)
    jobs = None
    if service_settings.expose_jobs != "off":
        jobs = await open_jobs(settings, service_settings, model, metrics, lambda: gate.stopping, stack)
    answers = IdempotencyStore[Verdict](service_settings.idempotency_retention_s, service_settings.idempotency_max_keys)
    return Service(service_settings, metrics, gate, bodies, model, answers, similar, review, dashboard, jobs)


def _configure_logs(settings: Settings, service_settings: ServiceSettings) -> None:
    secrets = [key for _, key in service_settings.named_keys]
    if service_settings.webhook_secret:
        secrets.append(service_settings.webhook_secret.get_secret_value())
    if settings.llm_api_key:
        secrets.append(settings.llm_api_key.get_secret_value())
    configure_logging(settings.log_level, secrets=secrets)
    adopt_server_logs()
    for handler in logging.getLogger().handlers:
        handler.addFilter(TracebackRedactor())
        handler.addFilter(RequestIdFilter())


def _host(config: uvicorn.Config | None) -> str | None:
    """Return the address that the server listens on, ``localhost`` for a Unix socket; None if it is unknown."""
    if config is None:
        return None
    if config.fd is None:
        return "localhost" if config.uds is not None else config.host
    with socket.socket(fileno=os.dup(config.fd)) as listener:
        name = listener.getsockname()
    return str(name[0]) if isinstance(name, tuple) else "localhost"


def _raise_open_files() -> int:
    """Raise the limit on open files, and so on connections, up to MAX_OPEN_FILES; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
