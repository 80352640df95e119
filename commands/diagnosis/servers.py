"""Checks of several model servers for ``cli.py doctor``: whether they can share a run."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from commands.diagnosis.findings import Finding, error, ok, warning
from config import Settings
from error_handler import ConfigurationError, LLMError
from worker.pool_server import Server, Traits
from worker.server_pool import open_pool

REMEDY = "Install the same model and version on all servers, or use --allow-mixed-models."


async def diagnose_servers(settings: Settings) -> AsyncGenerator[Finding]:
    """Yield a finding for each model server of *settings*: whether it is like the first that answers.

    No model is loaded, so the windows are not compared.
    """
    found: dict[Server, Traits] = {}
    async with open_pool(settings, 1) as pool:
        for server in pool.servers:
            try:
                found[server] = await server.check()
            except (LLMError, ConfigurationError) as exc:
                yield warning(f"{server.name} takes no calls in a run: {exc}.", "See the findings about this server.")
    if not found:
        return
    (first, traits), *others = found.items()
    yield ok(f"{first.name} sets the model digest and the version for all servers.")
    alike = [server for server, one in others if one == traits]
    for server, one in others:
        sentence = f"{server.name} has {' and '.join(one.differences(traits))}"
        if server in alike:
            yield ok(f"{server.name} has the same model digest and version.")
        elif settings.allow_mixed_models:
            yield ok(f"{sentence}; ALLOW_MIXED_MODELS accepts that.")
        elif alike:
            yield warning(f"{sentence}, so a run leaves it out.", REMEDY)
        else:
            yield error(f"{sentence}. No two servers are alike, so a run ends at its start.", REMEDY)
