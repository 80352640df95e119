"""What a provider is asked while it is away: how often is counted, nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from embedding_index.embedding_run import EmbeddingRun, RunOptions
from embedding_index.providers.contract import Answer
from embedding_index.vector_ledger import VectorLedger
from error_handler import ProviderUnavailableError
from tests.embedding_index.embedding_site import keyed, short_texts
from tests.embedding_index.test_embedding_run import Strict

OUTAGE = 200  # calls


class Away(Strict):
    """Answers none of the first OUTAGE calls."""

    def embed(self, texts: Sequence[str], *more: Any) -> Answer:
        if len(self.asked) < OUTAGE:
            self.asked.append(list(texts))
            raise ProviderUnavailableError("it is away")
        return super().embed(texts, *more)


@pytest.mark.parametrize(("calls", "in_the_end"), [(4, 9), (9, 9), (40, 40)])
def test_in_an_outage_only_a_few_calls_are_divided(tmp_path: Path, calls: int, in_the_end: int) -> None:
    """A few are, because one of their texts may be the reason; where many wait, each of the halves would be asked for."""
    provider = Away(most=100)
    texts = short_texts(16 * calls)
    with VectorLedger(tmp_path / "vectors.sqlite3") as ledger:
        run = EmbeddingRun(provider, ledger, RunOptions(batch_size=16, max_retries=0, first_wait_s=0.0))
        problems = [ended.problem for ended in run.run(keyed(texts))]
    assert problems == [None] * len(texts)
    answered = provider.asked[OUTAGE:]
    assert sorted(text for call in answered for text in call) == sorted(texts)
    assert len(answered) == in_the_end
    # Each division asks two new questions; all others repeat one.
    assert len({tuple(call) for call in provider.asked}) == calls + 2 * (in_the_end - calls)
