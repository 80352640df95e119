"""The share of the window that is used after one refusal or one answer, counted by real tokenizers."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from config import load_taxonomy
from domain.conversation import Conversation, Turn
from error_handler import LLMContextError
from model_server.protocol import NUM_PREDICT, ChatTarget
from model_server.window import TRIALS, TranscriptTruncator
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


@cache
def conversation_of(kind: str, seed: int, turns: int = 700) -> Conversation:
    """The turns of *kind*; of the parts of "digits+chinese", say, in turn."""
    chance, kinds = random.Random(seed), kind.split("+")
    made = tuple(
        Turn("agent" if number % 2 else "customer", turn_of(kinds[number % len(kinds)], chance))
        for number in range(turns)
    )
    return Conversation("messages", "1", made, len(made))


@cache
def tokens_of_text(tokenizer: str, text: str) -> int:
    import bpe_openai  # its tables take a second, in each process that collects the tests

    return len(bpe_openai.get_encoding(tokenizer).encode(text))


def tokens_of(tokenizer: str, transcript: str) -> int:
    messages = chat_messages(SYSTEM, transcript)
    return sum(tokens_of_text(tokenizer, message["content"]) for message in messages) + TEMPLATE_TOKENS


class Server:
    """Ollama as it counts with *tokenizer*: it refuses a prompt beyond the window with its count, or without."""

    def __init__(self, tokenizer: str, num_ctx: int, truncator: TranscriptTruncator) -> None:
        self.tokenizer, self.truncator = tokenizer, truncator
        self.target = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "m", None, num_ctx, "10m")
        self.refusals = 0

    def use_of(self, conversation: Conversation, *, tells_count: bool = True) -> float:
        """Fit and ask until *conversation* is answered, as the classifier does; return the share of the window used."""
        fitted = self.truncator.fit(conversation, self.target)
        for _ in range(4):
            tokens = tokens_of(self.tokenizer, fitted.transcript)
            if tokens <= self.target.num_ctx:
                self.truncator.require_whole(fitted, self.target, tokens)
                self.truncator.learn(fitted, tokens)
                return tokens / (self.target.num_ctx - NUM_PREDICT)
            self.refusals += 1
            known = {"prompt_tokens": tokens, "window_tokens": self.target.num_ctx} if tells_count else {}
            fitted = self.truncator.fit_again(conversation, fitted, self.target, LLMContextError("", **known))
        raise AssertionError("the conversation was never answered")


KINDS = ["english", pytest.param("salad", marks=pytest.mark.thorough), "digits", "chinese"]
MIXED = ["digits+chinese", "english+chinese", "english+digits", "english+digits+chinese"]


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 2))
@pytest.mark.parametrize("kind", [*KINDS, *mostly_thorough(MIXED, 4)])
@pytest.mark.parametrize("num_ctx", [4096, pytest.param(8192, marks=pytest.mark.thorough)])
def test_window_is_used_in_a_run_of_one_kind(tokenizer: str, kind: str, num_ctx: int) -> None:
    """After one short English answer, whatever the kind: at most one refusal in the run, and none after it."""
    server = Server(tokenizer, num_ctx, TranscriptTruncator(SYSTEM))
    server.use_of(conversation_of("english", 9, turns=4))
    uses = [server.use_of(conversation_of(kind, seed)) for seed in (2, 3)]
    assert all(LEAST_USE <= use <= 1 for use in uses), uses
    assert server.refusals == (kind not in ("english", "salad"))


@pytest.mark.thorough
def test_window_is_used_in_a_run_of_all_kinds() -> None:
    """One refusal for each kind of text without an answer so far, whatever came before."""
    kinds = ["chinese", "english", "digits", "salad", *MIXED]
    server = Server("o200k_base", 8192, TranscriptTruncator(SYSTEM))
    uses = [server.use_of(conversation_of(kind, seed)) for seed in (2, 3) for kind in kinds]
    assert all(LEAST_USE <= use <= 1 for use in uses), uses
    assert server.refusals <= 3


@pytest.mark.parametrize("num_ctx", [4096, pytest.param(8192, marks=pytest.mark.thorough)])
def test_window_is_used_by_the_very_first_conversation(num_ctx: int) -> None:
    """Nothing is known about the model's tokens, not even those of the instructions."""
    for kind in ("english", "digits", "chinese", "digits+chinese"):
        server = Server("cl100k_base", num_ctx, TranscriptTruncator(SYSTEM))
        assert LEAST_USE <= server.use_of(conversation_of(kind, 2)) <= 1
        assert server.refusals <= 1


def test_refusal_without_a_count_ends_the_trials() -> None:
    """The estimate then decides, and each conversation costs one request."""
    server = Server("cl100k_base", 8192, TranscriptTruncator(SYSTEM))
    for kind in ("digits", "chinese", "english"):
        assert server.use_of(conversation_of(kind, 2), tells_count=False) <= 1
    assert server.refusals == 1


def test_trials_are_limited_if_nothing_is_learnt() -> None:
    """Long runs of one sign say nothing about other texts, so each such conversation could be tried for ever."""
    server = Server("cl100k_base", 4096, TranscriptTruncator(SYSTEM))
    for seed in range(TRIALS + 3):
        chinese = conversation_of("chinese", seed, turns=120)
        ruled = Conversation("messages", "1", (Turn("customer", "-" * 40 + "问题"), *chinese.turns), 121)
        assert server.use_of(ruled) <= 1
    assert server.refusals <= TRIALS


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 3))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ctx", [4096, pytest.param(8192, marks=pytest.mark.thorough)])
def test_window_is_used_after_one_refusal(tokenizer: str, kind: str, num_ctx: int) -> None:
    """At least 85 % of what the answer leaves of the window, and never more than all of it."""
    target = ChatTarget("openai_chat", "http://m:1/v1/chat/completions", "http://m:1", "m", None, num_ctx, "10m")
    truncator, conversation = TranscriptTruncator(SYSTEM), conversation_of(kind, 1)
    whole = truncator.fit(conversation, target)
    refusal = LLMContextError("", prompt_tokens=tokens_of(tokenizer, whole.transcript), window_tokens=num_ctx)
    fitted = truncator.fit_again(conversation, whole, target, refusal)
    assert LEAST_USE <= tokens_of(tokenizer, fitted.transcript) / (num_ctx - NUM_PREDICT) <= 1


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_window_is_used_after_one_answer(tokenizer: str, kind: str) -> None:
    """The same if the first long conversation was fitted by the first estimate, and answered."""
    num_ctx = 8192
    target = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "m", None, num_ctx, "10m")
    truncator = TranscriptTruncator(SYSTEM)
    first = truncator.fit(conversation_of(kind, 1), target)
    truncator.learn(first, tokens_of(tokenizer, first.transcript))
    second = truncator.fit(conversation_of(kind, 2), target)
    assert LEAST_USE <= tokens_of(tokenizer, second.transcript) / (num_ctx - NUM_PREDICT) <= 1


@pytest.mark.parametrize("tokenizer", mostly_thorough(TOKENIZERS, 3))
def test_odd_text_does_not_spoil_the_estimate_of_others(tokenizer: str) -> None:
    """Base64 has five times the tokens of English; the refusal of one such text says nothing about English."""
    target = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "m", None, 4096, "10m")
    truncator, chance = TranscriptTruncator(SYSTEM), random.Random(3)
    blob = "".join(chance.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=20_000))
    conversation = Conversation("messages", "1", (Turn("customer", blob),), 1)
    sent = truncator.fit(conversation, replace(target, protocol="openai_chat"))
    refusal = LLMContextError("", prompt_tokens=tokens_of(tokenizer, sent.transcript), window_tokens=4096)
    assert (
        tokens_of(tokenizer, truncator.fit_again(conversation, sent, target, refusal).transcript) <= 4096 - NUM_PREDICT
    )
    assert not truncator.fit(conversation_of("english", 2, turns=65), target).is_trial  # it fits
    server = Server(tokenizer, 4096, truncator)
    assert LEAST_USE <= server.use_of(conversation_of("english", 2)) <= 1
    assert server.refusals <= 1
