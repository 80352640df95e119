"""Prices of OpenAI's Batch API and embeddings, from the genai-prices package. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import version

from genai_prices import Usage, calc_price

PROVIDER = "openai"
# Models without reasoning tokens, so that token counts of other models apply to them.
MODELS = ("gpt-4o-mini", "gpt-4.1-mini", "gpt-4.1-nano")
BATCH = {"processing": "batch"}
SHORT_PROMPT = 100_000  # tokens; no model has another price for shorter ones
BATCH_FACTOR = 0.5  # OpenAI's batch rate for every model so far; used if the package has no rate


@dataclass(frozen=True, slots=True)
class BatchPrice:
    """A price in US dollars. *since* is the start date of the batch rate in the package, None if the rate is assumed."""

    model: str
    usd: float
    since: date | None

    @property
    def is_assumed(self) -> bool:
        """True if the price is half the usual one because the package has no batch rate."""
        return self.since is None


def dollars(usd: float) -> str:
    """Return *usd* with as many digits as are significant."""
    return f"{usd:.2f}" if usd >= 10 else f"{usd:.4f}" if usd >= 0.01 else f"{usd:.6f}"


def price_source() -> str:
    """Return name and version of the package with the prices."""
    return f"genai-prices {version('genai-prices')}"


def batch_prices(
    prompt_tokens: float, reply_tokens: float, models: Sequence[str] = MODELS, longest_prompt: float = 0
) -> list[BatchPrice]:
    """Return the batch price of *prompt_tokens* and *reply_tokens*, summed over many calls, for each of *models*.

    Models that the package does not have are left out. If a model has another price for prompts as long as
    *longest_prompt*, all are priced as such.
    """
    prices = []
    now = datetime.now(UTC)
    # The package prices one call, and takes a large sum for one long prompt.
    parts = max(1.0, prompt_tokens / max(longest_prompt, SHORT_PROMPT))
    usage = Usage(input_tokens=round(prompt_tokens / parts), output_tokens=round(reply_tokens / parts))
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
            prices.append(BatchPrice(model, parts * float(usual.total_price) * BATCH_FACTOR, None))
        else:
            batch = calc_price(usage, model, provider_id=PROVIDER, price_context=BATCH)
            prices.append(BatchPrice(model, parts * float(batch.total_price), since))
    return prices


def embedding_price(model: str, tokens: int) -> float | None:
    """Return the price of embedding *tokens* with OpenAI's *model* in US dollars; None if the package has no price."""
    try:
        return float(calc_price(Usage(input_tokens=tokens), model, provider_id=PROVIDER).total_price)
    except LookupError:
        return None
