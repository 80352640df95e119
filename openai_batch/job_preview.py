"""The preview of a job: its requests and their price. Reads documents; sends and changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from domain.prices import BatchPrice, batch_prices, price_source
from error_handler import JobCostError, JobProcessingError
from openai_batch.job_config import AppConfig
from openai_batch.job_context import Handling
from openai_batch.job_store import JobStore
from openai_batch.ledger import Shard
from openai_batch.planning import estimated_tokens, request_line
from storage.extended_json import id_text

EXAMPLES, PROBLEMS = 3, 10  # shown documents: requests, and reasons for refusals


@dataclass(slots=True)
class Preview:
    """The requests of the pending documents, and of those in files that are not sent yet (*waiting*).

    *prompt_tokens* is an upper estimate, *most_reply_tokens* the limit of all answers together. *usd* is the price at
    the batch rate if every answer had the maximum length; None if the model's price is unknown. *examples* are the
    exact bodies of the first documents, *problems* the reasons of the first *refused* ones.
    """

    documents: int = 0
    waiting: int = 0
    refused: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    prompt_tokens: int = 0
    most_reply_tokens: int = 0
    price: BatchPrice | None = None
    examples: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def usd(self) -> float | None:
        """The upper bound of the price in US dollars."""
        return None if self.price is None else self.price.usd

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, without the examples."""
        return {
            "documents": self.documents,
            "waiting": self.waiting,
            "refused": self.refused,
            "bytes": self.bytes,
            "prompt_tokens": self.prompt_tokens,
            "most_reply_tokens": self.most_reply_tokens,
            "most_usd": None if self.usd is None else round(self.usd, 6),
            "price_is_assumed": None if self.price is None else self.price.is_assumed,
            "prices_from": price_source(),
        }


async def preview(
    config: AppConfig,
    store: JobStore,
    handling: Handling,
    on_progress: Callable[[str], None],
    limit: int | None = None,
    waiting: Sequence[Shard] = (),
) -> Preview:
    """Return the preview of the pending documents (at most *limit*) and of *waiting*, the shards not sent yet."""
    made = Preview(waiting=sum(shard.lines for shard in waiting))
    made.bytes = sum(shard.bytes for shard in waiting)
    made.prompt_tokens = sum(shard.tokens for shard in waiting)
    made.most_reply_tokens = made.waiting * config.openai.max_tokens
    async with contextlib.aclosing(store.pages(config.batch.batch_size)) as pages:
        async for page in pages:
            for document in page:
                if made.documents == limit:
                    break
                try:
                    body = handling.request(document)
                    line = request_line("0" * 42, config.batch.endpoint, body)
                except JobProcessingError as exc:
                    made.refused += 1
                    if len(made.problems) < PROBLEMS:
                        made.problems[id_text(document["_id"])] = str(exc)
                    continue
                made.documents += 1
                made.bytes += len(line)
                made.prompt_tokens += estimated_tokens(body)
                made.most_reply_tokens += config.openai.max_tokens
                if len(made.examples) < EXAMPLES:
                    made.examples.append((id_text(document["_id"]), body))
            on_progress(f"{made.documents} documents read")
            if made.documents == limit:
                break
    prices = batch_prices(made.prompt_tokens, made.most_reply_tokens, [config.openai.model])
    made.price = prices[0] if prices else None
    return made


def dollars(usd: float) -> str:
    """Return *usd* with as many digits as are significant."""
    return f"{usd:.2f}" if usd >= 10 else f"{usd:.4f}" if usd >= 0.01 else f"{usd:.6f}"


def require_affordable(made: Preview, most_usd: float, model: str) -> None:
    """Raise JobCostError if *made* may cost more than *most_usd*, or its price is unknown."""
    if made.usd is None:
        raise JobCostError(
            f"the price of {model} is not known, so --max-cost cannot be checked; leave it out to send anyway."
        )
    if made.usd > most_usd:
        raise JobCostError(
            f"{made.documents + made.waiting} documents may cost up to {dollars(made.usd)} US dollars, more than --max-cost {most_usd:g}; "
            "reduce --limit or OPENAI_MAX_TOKENS, or raise --max-cost."
        )
