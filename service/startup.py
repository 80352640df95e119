"""Start-up of the service: logs, address check, open files, the model, and the parts that the routes share."""

from __future__ import annotations

import gc
import logging
import resource
import time
from asyncio import get_running_loop
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated

import uvicorn
from fastapi import Depends, Request

from config import Settings
from config.service_settings import ServiceSettings
from logger import RequestIdFilter, TracebackRedactor, adopt_server_logs, configure_logging
from service.access import ServiceGate
from service.idempotency import IdempotencyStore
from service.metrics import ServiceMetrics
from service.model import ModelService, Verdict
from service.slow_clients import SlowClientGuard
from utils.network import inherited_host, require_keys_outside_this_machine

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 65_536
RESERVED_FILES = 64  # logs, the listening socket, the event loop


@dataclass(frozen=True, slots=True)
class Service:
    """The objects that the routes share while the service runs."""

    settings: ServiceSettings
    model: ModelService
    answers: IdempotencyStore[Verdict]
    gate: ServiceGate
    metrics: ServiceMetrics

    def deadline(self, request: Request) -> float:
        """Return when the time of *request* is over, on the clock of the running loop."""
        spent_s: float = time.monotonic() - request.state.started_at
        return get_running_loop().time() + self.settings.request_timeout_s - spent_s


async def _running_service(request: Request) -> Service:
    service: Service = request.state.service
    return service


RunningService = Annotated[Service, Depends(_running_service)]


async def start(
    settings: Settings, service_settings: ServiceSettings, config: uvicorn.Config | None, stack: AsyncExitStack
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
    metrics = ServiceMetrics()
    gate = ServiceGate(service_settings)
    model = await stack.enter_async_context(ModelService(settings, service_settings, metrics))

    def stop(grace_s: float) -> None:
        logger.info("stopping: running requests have %.1f s to finish", grace_s)
        gate.stopping = True
        model.deadlines.stop(grace_s)

    if config is not None:
        max_connections = max(16, _raise_open_files() - RESERVED_FILES - service_settings.max_concurrent)
        guard = SlowClientGuard(config, service_settings, settings.shutdown_grace_s, max_connections, stop)
        await stack.enter_async_context(guard)
    answers = IdempotencyStore[Verdict](service_settings.idempotency_retention_s, service_settings.idempotency_max_keys)
    return Service(service_settings, model, answers, gate, metrics)


def freeze_garbage_collector() -> None:
    """Exclude what exists after the start from garbage collection.

    Full collections that walk the modules and the application paused requests for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()


def _configure_logs(settings: Settings, service_settings: ServiceSettings) -> None:
    secrets = [key for _, key in service_settings.named_keys]
    if settings.llm_api_key:
        secrets.append(settings.llm_api_key.get_secret_value())
    configure_logging(settings.log_level, secrets=secrets)
    adopt_server_logs()
    for handler in logging.getLogger().handlers:
        handler.addFilter(TracebackRedactor())
        handler.addFilter(RequestIdFilter())


def _host(config: uvicorn.Config | None) -> str | None:
    if config is None:
        return None
    if config.fd is not None:
        return inherited_host(config.fd)
    return "localhost" if config.uds is not None else config.host


def _raise_open_files() -> int:
    """Raise the limit on open files, and so on connections, up to MAX_OPEN_FILES; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
