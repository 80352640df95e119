"""Token counts: OpenAI's own where its tokenizer is installed, and an estimate that is not too low."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedding_index.providers.openai_embeddings import (
    COUNTED_CHARACTERS,
    COUNTED_MODELS,
    estimated_tokens,
    openai_counter,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bpe_openai") is None, reason="requirements-index.txt is not installed"
)

SAMPLES = Path(__file__).parents[2] / "data/sample_conversations.jsonl"
SCRIPTS = {
    "German": "Sehr geehrte Damen und Herren, bitte überweisen Sie mir das Geld für die Größe XL zurück.",
    "Polish": "Dzień dobry, z mojej karty pobrano pieniądze dwa razy, proszę o zwrot.",
    "Turkish": "Merhaba, kartımdan iki kez para çekildi, lütfen iade edin.",
    "Finnish": "Hyvää päivää, korttiani on veloitettu kaksi kertaa, pyydän palauttamaan rahat tilille.",
    "Vietnamese": "Xin chào, thẻ của tôi bị trừ tiền hai lần, vui lòng hoàn tiền lại.",
    "Russian": "Здравствуйте, моя карта заблокирована, и я не могу оплатить заказ. Помогите, пожалуйста!",
    "Greek": "Καλησπέρα, η κάρτα μου χρεώθηκε δύο φορές, παρακαλώ επιστρέψτε τα χρήματα.",
    "Arabic": "مرحبا، تم خصم المبلغ مرتين من بطاقتي، أرجو إعادة المال.",
    "Hebrew": "שלום, הכרטיס שלי חויב פעמיים, אנא החזירו את הכסף.",
    "Chinese": "您好，我的信用卡被重复扣款，请尽快退款。",
    "Japanese": "カードが二重に請求されました。返金をお願いします。",
    "Korean": "안녕하세요, 카드가 두 번 결제되었습니다. 환불해 주세요.",
    "Hindi": "नमस्ते, मेरे कार्ड से दो बार पैसे कट गए हैं, कृपया वापस करें।",
    "Thai": "สวัสดีครับ บัตรของผมถูกตัดเงินสองครั้ง กรุณาคืนเงินด้วยครับ",
    "Georgian": "გამარჯობა, ჩემი ბარათიდან თანხა ორჯერ ჩამოიჭრა",
    "Tamil": "வணக்கம், என் அட்டையிலிருந்து இரண்டு முறை பணம் எடுக்கப்பட்டது",
    "emoji": "😀😀🎉🙏🏽 thanks 👩‍👩‍👧",
    "tables": "CREATE TABLE public.refunds (id bigint NOT NULL, order_id bigint REFERENCES orders(id), amount numeric(10,2));",
    "names": "customer_id, shipping_addr_line2, is_deleted, utm_campaign_src, fk_acct_id, tx_hash_sha256",
    "numbers": "order 8f14e45f-ceea-467f-a2d1-9c0e4b6f3a21, ref ZXQ-77121-KJ, +44 20 7946 0958",
    "slang": "wnat my mony bakc plz thx brb asap fyi tbh",
    "one word": "hi",
    "nothing": "",
}


@pytest.fixture(scope="module")
def real() -> Callable[[str], int]:
    counter = openai_counter("text-embedding-3-small")
    assert counter is not None
    return counter


def sample_texts() -> list[str]:
    """Every message and every conversation of the samples."""
    texts = []
    for line in SAMPLES.read_text(encoding="utf-8").splitlines():
        messages = [tweet["text"] for tweet in json.loads(line).get("tweets", [])]
        texts += [*messages, "\n".join(messages)]
    assert len(texts) > 200
    return texts


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("tiktoken is great!", 6),  # README of tiktoken
        ("antidisestablishmentarianism", 6),  # OpenAI's cookbook, "How to count tokens with tiktoken", cl100k_base
        ("2 + 2 = 4", 7),
        ("お誕生日おめでとう", 9),
        ("", 1),
        ("<|endoftext|>", 7),  # as text: the API takes no special tokens
        ("\ud83d", 1),
    ],
)
def test_counts_of_cl100k_base(real: Callable[[str], int], text: str, tokens: int) -> None:
    assert real(text) == tokens


def test_long_texts_are_counted(real: Callable[[str], int]) -> None:
    """The package refuses more than 200,000 tokens; what it counts in pieces is the sum."""
    text = "words and more " * (2 * COUNTED_CHARACTERS // 15)
    assert real(text) == pytest.approx(3 * 2 * COUNTED_CHARACTERS // 15, rel=0.001)
    assert real("値" * 250_000) >= 250_000


def test_no_counter_for_models_that_others_tokenize() -> None:
    assert openai_counter("bge-m3") is None
    assert {model for model in COUNTED_MODELS if openai_counter(model) is None} == set()


def test_no_counter_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    assert openai_counter("text-embedding-3-small") is None


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_estimate_is_not_too_low(real: Callable[[str], int], name: str) -> None:
    assert estimated_tokens(SCRIPTS[name]) >= real(SCRIPTS[name])


def test_the_estimate_is_not_too_low_for_conversations(real: Callable[[str], int]) -> None:
    assert [text for text in sample_texts() if estimated_tokens(text) < real(text)] == []
