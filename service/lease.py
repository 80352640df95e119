"""The service's side of the lease that holds back batch workers on its model server (storage/service_lease.py)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from config import Settings
from error_handler import ConfigurationError, StoreError
from service.admission import AdmissionQueue
from storage.mongo_connection import close_client, open_client
from storage.service_lease import RENEW_S, renew_lease, server_name

logger = logging.getLogger(__name__)

AFTER_FAILURE_S = 10.0


@asynccontextmanager
async def lease_while_busy(settings: Settings, queue: AdmissionQueue) -> AsyncIterator[None]:
    """Renew the lease in the background, each RENEW_S, while *queue* has requests.

    No request waits for it. If MongoDB is away, one warning is logged, and workers are not held back.
    """
    task = asyncio.create_task(_renew(settings, queue), name="service-lease")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _renew(settings: Settings, queue: AdmissionQueue) -> None:
    servers, is_told = [server_name(one.server_url) for one in settings.for_each_server()], False
    try:
        client = open_client(settings)
    except ConfigurationError as exc:
        _warn(exc)
        return
    try:
        while True:
            if not queue.requests:
                await queue.entered.wait()
            queue.entered.clear()
            try:
                await renew_lease(client[settings.db_name], *servers)
                is_told = False
                await asyncio.sleep(RENEW_S)
            except (StoreError, ConfigurationError) as exc:
                if not is_told:
                    _warn(exc)
                is_told = True
                await asyncio.sleep(AFTER_FAILURE_S)
    finally:
        await close_client(client)


def _warn(exc: Exception) -> None:
    logger.warning(
        "batch workers are not held back while requests wait (SERVICE_LEASE=false if there are none): %s", exc
    )
