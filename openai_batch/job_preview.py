"""The preview of a job: its requests and their price. Reads documents; sends and changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from domain.prices import BatchPrice, batch_prices, price_source
from error_handler import JobCostError, JobProcessingError
from openai_batch.job_config import AppConfig, Document
from openai_batch.job_context import Handling
from openai_batch.job_store import JobStore
from openai_batch.ledger import Shard
from openai_batch.planning import estimated_tokens, request_line
from storage.extended_json import id_text

EXAMPLES, PROBLEMS = 3, 10  # shown documents: requests, and reasons for refusals


@dataclass(slots=True)
class Preview:
    """The requests of the pending documents, and of those in files that are not sent yet (*waiting*).

    *prompt_tokens* is an upper estimate, *most_reply_tokens* the limit of all answers together. *price* is that of
    answers of the maximum length; None if the model's price is unknown. *examples* are the exact bodies of the first
    documents, *problems* the reasons of the first *refused* ones.
    """

    documents: int = 0
    waiting: int = 0
    refused: int = 0
    bytes: int = 0
    prompt_tokens: int = 0
    most_reply_tokens: int = 0
    price: BatchPrice | None = None
    problems: dict[str, str] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        names = ("documents", "waiting", "refused", "bytes", "prompt_tokens", "most_reply_tokens")
        return {
            **{name: getattr(self, name) for name in names},
            "most_usd": None if self.price is None else round(self.price.usd, 6),
            "price_is_assumed": None if self.price is None else self.price.is_assumed,
            "prices_from": price_source(),
            "examples": self.examples,
        }

    def add(self, document: Document, handling: Handling, endpoint: str) -> None:
        """Count the request of *document*, or the reason why there is none."""
        name = id_text(document["_id"])
        try:
            body = handling.request(document)
            line = request_line("0" * 42, endpoint, body)
        except JobProcessingError as exc:
            self.refused += 1
            if len(self.problems) < PROBLEMS:
                self.problems[name] = str(exc)
            return
        self.documents += 1
        self.bytes += len(line)
        self.prompt_tokens += estimated_tokens(body)
        if len(self.examples) < EXAMPLES:
            self.examples.append({"document": name, "body": body})


async def preview(
    config: AppConfig,
    store: JobStore,
    handling: Handling,
    on_progress: Callable[[str], None],
    limit: int | None,
    unsent: Sequence[Shard],
) -> Preview:
    """Return the preview of the pending documents (at most *limit*) and of the *unsent* shards."""
    made = Preview(waiting=sum(shard.lines for shard in unsent))
    made.bytes = sum(shard.bytes for shard in unsent)
    made.prompt_tokens = sum(shard.tokens for shard in unsent)
    async with contextlib.aclosing(store.pages(config.batch.batch_size)) as pages:
        async for page in pages:
            for document in page:
                if made.documents != limit:
                    made.add(document, handling, config.batch.endpoint)
            on_progress(f"{made.documents} documents read")
            if made.documents == limit:
                break
    made.most_reply_tokens = (made.documents + made.waiting) * config.openai.max_tokens
    prices = batch_prices(made.prompt_tokens, made.most_reply_tokens, [config.openai.model])
    made.price = prices[0] if prices else None
    return made


def dollars(usd: float) -> str:
    """Return *usd* with as many digits as are significant."""
    return f"{usd:.2f}" if usd >= 10 else f"{usd:.4f}" if usd >= 0.01 else f"{usd:.6f}"


def require_affordable(made: Preview, most_usd: float, model: str) -> None:
    """Raise JobCostError if *made* may cost more than *most_usd*, or its price is unknown."""
    if made.price is None:
        raise JobCostError(
            f"the price of {model} is not known, so --max-cost cannot be checked; leave it out to send anyway."
        )
    if made.price.usd > most_usd:
        raise JobCostError(
            f"{made.documents + made.waiting} documents may cost up to {dollars(made.price.usd)} US dollars, more than "
            f"--max-cost {most_usd:g}; reduce --limit or OPENAI_MAX_TOKENS, or raise --max-cost."
        )
