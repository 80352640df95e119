"""Nothing that costs more than ``--max-cost`` is sent without a yes."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from error_handler import EmbeddingCostError


@dataclass(frozen=True, slots=True)
class Spending:
    """What a run may spend: *max_usd* None is any sum, *is_agreed* that nobody need be asked."""

    max_usd: float | None
    is_agreed: bool

    @property
    def has_limit(self) -> bool:
        """Whether the price must be known before something is sent."""
        return self.max_usd is not None and not self.is_agreed


async def require_affordable(spending: Spending, usd: float | None, price: str) -> None:
    """Return where *usd* (None: not known) may be spent; where it is more than the limit, ask on a terminal.

    *price* says it for people.

    Raises:
        EmbeddingCostError: It may not, or nobody can be asked.
    """
    if not spending.has_limit or (usd is not None and spending.max_usd is not None and usd <= spending.max_usd):
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        sys.stderr.write(f"This costs {price}, more than --max-cost {spending.max_usd:g} allows. Go on? [y/N] ")
        sys.stderr.flush()
        if (await _line()).strip().lower() in ("y", "yes"):
            return
    raise EmbeddingCostError(f"Nothing was sent: {price}; raise --max-cost, or give --yes to spend it.")


async def _line() -> str:
    """Return a line of the terminal. Waits in the event loop, so that Ctrl-C ends the wait."""
    loop, is_there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), is_there.set)
    try:
        await is_there.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return sys.stdin.readline()
