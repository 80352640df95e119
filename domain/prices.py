"""What tokens cost at OpenAI, by its Batch API and as embeddings; the only owner of genai_prices.

The prices are those inside the installed package: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import version

from genai_prices import Usage, calc_price

PROVIDER = "openai"
# Models that answer without reasoning tokens of their own, so that token counts carry over.
MODELS = ("gpt-4o-mini", "gpt-4.1-mini", "gpt-4.1-nano")
BATCH = {"processing": "batch"}
BATCH_FACTOR = 0.5  # what OpenAI has asked for batches of every model so far, where the package names no rate


@dataclass(frozen=True, slots=True)
class BatchPrice:
    """US dollars for all tokens. *since* is the date from which the package knows the batch rate, None where it is assumed."""

    model: str
    usd: float
    since: date | None

    @property
    def is_assumed(self) -> bool:
        """Whether the price is half the usual one because the package names no batch rate."""
        return self.since is None


def price_source() -> str:
    """Return the name and version of the package that the prices come from."""
    return f"genai-prices {version('genai-prices')}"


def batch_prices(prompt_tokens: float, reply_tokens: float, models: Sequence[str] = MODELS) -> list[BatchPrice]:
    """Return what *prompt_tokens* and *reply_tokens* of many calls cost with each of *models*.

    One the package lacks is left out. None of them may have another price for long prompts: this is one sum.
    """
    prices = []
    now = datetime.now(UTC)
    usage = Usage(input_tokens=round(prompt_tokens), output_tokens=round(reply_tokens))
    for model in models:
        try:
            usual = calc_price(usage, model, provider_id=PROVIDER)
        except LookupError:
            continue
        since = None
        for variant in usual.model.price_variants or ():
            if variant.when == BATCH:
                since = getattr(variant.constraint, "start_date", None)
        if since is None or since > now.date():
            prices.append(BatchPrice(model, float(usual.total_price) * BATCH_FACTOR, None))
        else:
            batch = calc_price(usage, model, provider_id=PROVIDER, price_context=BATCH)
            prices.append(BatchPrice(model, float(batch.total_price), since))
    return prices


def embedding_price(model: str, tokens: int) -> float | None:
    """Return what embedding *tokens* with OpenAI's *model* costs in US dollars; None where the package has no price."""
    try:
        return float(calc_price(Usage(input_tokens=tokens), model, provider_id=PROVIDER).total_price)
    except LookupError:
        return None
