"""Calls to a provider that is away are counted, not timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from embedding_index.embedding_run import PROBE, EmbeddingRun, RunOptions
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
    answered = [call for call in provider.asked[OUTAGE:] if call != [PROBE]]
    assert sorted(text for call in answered for text in call) == sorted(texts)
    assert len(answered) == in_the_end
    # Each division asks two new questions; all others repeat one.
    assert len({tuple(call) for call in provider.asked} - {(PROBE,)}) == calls + 2 * (in_the_end - calls)


class Crashing(Strict):
    """Gives no answer to a call with a text that has *bad* in it, as Ollama does for a vector with NaN."""

    def embed(self, texts: Sequence[str], *more: Any) -> Answer:
        if any("bad" in text for text in texts):
            raise ProviderUnavailableError("Ollama failed (HTTP 500)")
        return super().embed(texts, *more)


class Silent(Strict):
    """Gives no answer to any call."""

    def embed(self, texts: Sequence[str], *more: Any) -> Answer:
        raise ProviderUnavailableError("it is away")


@pytest.mark.parametrize("number", [1, 3, 20])
def test_texts_without_an_answer_fail_by_name_also_if_they_are_all(tmp_path: Path, number: int) -> None:
    """B4: no other text of the run shows that the provider is there, so a harmless one is sent."""
    texts = [f"bad {place}" for place in range(number)]
    options = RunOptions(batch_size=16, max_retries=1, first_wait_s=0.0)
    with VectorLedger(tmp_path / "vectors.sqlite3") as ledger:
        ended = list(EmbeddingRun(Crashing(most=100), ledger, options).run(keyed(texts)))
    assert len(ended) == number
    assert all("answers for others, and not for it" in str(each.problem) for each in ended)


def test_lone_text_is_not_blamed_for_an_outage(tmp_path: Path) -> None:
    """The harmless text gets no answer either."""
    options = RunOptions(max_retries=1, first_wait_s=0.01, patience_s=0.2)
    with VectorLedger(tmp_path / "vectors.sqlite3") as ledger:
        run = EmbeddingRun(Silent(most=100), ledger, options)
        with pytest.raises(ProviderUnavailableError, match="gave no usable answer"):
            list(run.run(keyed(["good"])))
