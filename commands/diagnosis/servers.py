"""Checks of several model servers for ``cli.py doctor``: whether they can share a run."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from commands.diagnosis.findings import Finding, error, ok, warning
from config import Settings
from error_handler import ConfigurationError, LLMError
from worker.server_pool import open_pool


async def diagnose_servers(settings: Settings) -> AsyncGenerator[Finding]:
    """Yield a finding for each model server of *settings*: it is like the first that answers, or takes no calls and why.

    No model is loaded, so the window is not compared.
    """
    async with open_pool(settings, 1) as pool:
        try:
            await pool.prepare()
        except (LLMError, ConfigurationError) as exc:
            yield error(str(exc), "Start or correct the servers above, then run the diagnosis again.")
        for state in pool.states():
            if state["is_ready"]:
                yield ok(f"{state['server']} takes calls.", **state)
            else:
                sentence = f"{state['server']} takes no calls: {state['problem']}."
                yield warning(sentence, "A run leaves it out until that changes.", **state)
