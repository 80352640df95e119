"""Prices of the OpenAI Batch API come from the package that is pinned, without a network."""

from __future__ import annotations

import socket
from datetime import date

import pytest

from domain.prices import MODELS, batch_prices, dollars, embedding_price, price_source


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any connection."""

    def refuse(*_: object) -> None:
        raise AssertionError("a price was asked for on the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_batch_rates_of_the_package() -> None:
    """A million tokens each of prompt and reply: 0.075 + 0.30 dollars since 14 October 2026."""
    prices = {price.model: price for price in batch_prices(1_000_000, 1_000_000)}
    assert set(prices) == set(MODELS)
    assert prices["gpt-4o-mini"].usd == pytest.approx(0.375)
    assert prices["gpt-4o-mini"].since == date(2026, 10, 14)
    assert price_source() == "genai-prices 0.2.3"


def test_half_the_usual_price_if_no_batch_rate_is_known() -> None:
    """The price is marked as assumed."""
    (price,) = batch_prices(1_000_000, 0, ["gpt-4o-search-preview"])
    assert price.is_assumed
    assert price.usd == pytest.approx(1.25)


def test_many_short_prompts_have_no_price_of_long_ones() -> None:
    """The model asks twice as much for prompts of more than 272,000 tokens."""
    (one,) = batch_prices(50_000, 10_000, ["gpt-5.6-terra"])
    (many,) = batch_prices(50_000_000, 10_000_000, ["gpt-5.6-terra"], longest_prompt=50_000)
    assert many.usd == pytest.approx(1000 * one.usd)
    (long,) = batch_prices(50_000_000, 0, ["gpt-5.6-terra"], longest_prompt=300_000)
    (short,) = batch_prices(50_000_000, 0, ["gpt-5.6-terra"])
    assert long.usd == pytest.approx(2 * short.usd)


def test_price_is_shown_with_significant_digits() -> None:
    assert [dollars(usd) for usd in (0.0000301, 0.0149, 12.345)] == ["0.000030", "0.0149", "12.35"]


def test_unknown_model_is_left_out() -> None:
    """The estimate still covers the other models."""
    assert batch_prices(1, 1, ["no-such-model"]) == []


def test_embedding_prices_of_the_package() -> None:
    """US dollars for a million tokens; None, not 0, where nobody knows."""
    assert embedding_price("text-embedding-3-small", 1_000_000) == pytest.approx(0.02)
    assert embedding_price("text-embedding-3-large", 1_000_000) == pytest.approx(0.13)
    assert embedding_price("text-embedding-3-small", 0) == 0
    assert embedding_price("no-such-model", 1_000_000) is None
