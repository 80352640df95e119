"""How much of the window is used after one refusal or one answer, counted by real tokenizers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from config import load_taxonomy
from domain.conversation import Conversation, Turn
from error_handler import LLMContextError
from model_server.protocol import NUM_PREDICT, ChatTarget
from model_server.window import TranscriptTruncator
from prompt_builder import build_system_prompt, chat_messages
from tests.cases import mostly_thorough

SYSTEM = build_system_prompt(load_taxonomy())
LEAST_USE = 0.85
# Three digits to a token, and one digit to a token; Chinese with 0.5 to 1.0 tokens to a character.
TOKENIZERS = ("cl100k_base", "o200k_base", "voyage3_base")
TEMPLATE_TOKENS = 12
ENGLISH = (
    "My parcel is late and nobody answers.|Could you send me the order number, please?|I was charged twice this month!|"
    "The app won't let me log in since the update.|Great service, thank you so much.|Where's my refund? It's been 3 weeks."
).split("|")
CHINESE = (
    "我的包裹迟到了|客服没有人回答|请告诉我什么时候到|订单已经付款三天了|物流信息一直没有更新|我想退款|屏幕碎了".split(
        "|"
    )
)


def turn_of(kind: str, chance: random.Random) -> str:
    if kind == "chinese":
        return "，".join(chance.choices(CHINESE, k=5)) + "。"
    if kind == "digits":
        return " ".join(str(chance.randrange(10 ** chance.choice((4, 8, 16)))) for _ in range(8))
    if kind == "salad":
        return " ".join(chance.choices(" ".join(ENGLISH).split(), k=18))
    return " ".join(chance.choices(ENGLISH, k=2))


def conversation_of(kind: str, seed: int) -> Conversation:
    chance = random.Random(seed)
    turns = tuple(Turn("agent" if number % 2 else "customer", turn_of(kind, chance)) for number in range(700))
    return Conversation("messages", "1", turns, len(turns))


def tokens_of(tokenizer: str, transcript: str) -> int:
    messages = chat_messages(SYSTEM, transcript)
    import bpe_openai  # its tables take a second, in each process that collects the tests

    encoding = bpe_openai.get_encoding(tokenizer)
    return sum(len(encoding.encode(message["content"])) for message in messages) + TEMPLATE_TOKENS


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 2))
@pytest.mark.parametrize("kind", ["english", "salad", "digits", "chinese"])
@pytest.mark.parametrize("num_ctx", [4096, pytest.param(8192, marks=pytest.mark.thorough)])
def test_window_is_used_after_one_refusal(tokenizer: str, kind: str, num_ctx: int) -> None:
    """At least 85 % of what the answer leaves of the window, and never more than all of it."""
    target = ChatTarget("openai_chat", "http://m:1/v1/chat/completions", "http://m:1", "m", None, num_ctx, "10m")
    truncator, conversation = TranscriptTruncator(SYSTEM), conversation_of(kind, 1)
    whole = truncator.fit(conversation, target)
    refusal = LLMContextError("", prompt_tokens=tokens_of(tokenizer, whole.transcript), window_tokens=num_ctx)
    fitted = truncator.fit_again(conversation, whole, target, refusal)
    assert LEAST_USE <= tokens_of(tokenizer, fitted.transcript) / (num_ctx - NUM_PREDICT) <= 1


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 2))
@pytest.mark.parametrize("kind", ["english", "salad", "digits", "chinese"])
def test_window_is_used_after_one_answer(tokenizer: str, kind: str) -> None:
    """The same if the first long conversation was fitted by the first estimate, and answered."""
    num_ctx = 8192
    target = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "m", None, num_ctx, "10m")
    truncator = TranscriptTruncator(SYSTEM)
    first = truncator.fit(conversation_of(kind, 1), target)
    truncator.learn(first, tokens_of(tokenizer, first.transcript))
    second = truncator.fit(conversation_of(kind, 2), target)
    assert LEAST_USE <= tokens_of(tokenizer, second.transcript) / (num_ctx - NUM_PREDICT) <= 1


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 2))
def test_odd_text_does_not_spoil_the_estimate_of_others(tokenizer: str) -> None:
    """Base64 has five times the tokens of English; the refusal of one such text says nothing about the instructions."""
    target = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "m", None, 4096, "10m")
    truncator, chance = TranscriptTruncator(SYSTEM), random.Random(3)
    blob = "".join(chance.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=20_000))
    conversation = Conversation("messages", "1", (Turn("customer", blob),), 1)
    sent = truncator.fit(conversation, replace(target, protocol="openai_chat"))
    refusal = LLMContextError("", prompt_tokens=tokens_of(tokenizer, sent.transcript), window_tokens=4096)
    assert (
        tokens_of(tokenizer, truncator.fit_again(conversation, sent, target, refusal).transcript) <= 4096 - NUM_PREDICT
    )
    fitted = truncator.fit(conversation_of("english", 2), target)
    assert 0.75 <= tokens_of(tokenizer, fitted.transcript) / (4096 - NUM_PREDICT) <= 1
