"""Estimates of tokens against a real tokenizer, in scripts it was made for and in others."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from config import load_taxonomy
from model_server.protocol import ChatTarget, parse_chat_response
from model_server.tokens import TokenEstimator, least_prompt_tokens, least_tokens, most_tokens
from prompt_builder import build_system_prompt, chat_messages
from tests.cases import mostly_thorough
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.worker.engine_run import run_worker

SYSTEM = build_system_prompt(load_taxonomy())
TARGET = ChatTarget("ollama_chat", "http://m:1/api/chat", "http://m:1", "llama3.2", None, 32_768, "10m")

WORDS = {
    "english": "my parcel is late and nobody at the support answers so please tell me when it will come",
    "russian": "моя посылка опаздывает и никто из поддержки не отвечает скажите пожалуйста когда она придёт",
    "greek": "το δέμα μου άργησε και κανείς δεν απαντά πείτε μου πότε θα έρθει",
    "arabic": "طردي متأخر ولا أحد يجيب من فضلك أخبرني متى سيصل",
    "hindi": "मेरा पार्सल देर से आ रहा है और कोई जवाब नहीं देता कृपया बताएं कब आएगा",
    "chinese": "我的 包裹 迟到了 客服 没有人 回答 请 告诉我 什么时候 到",
    "thai": "พัสดุของฉันล่าช้า และไม่มีใครตอบ กรุณาบอกฉันว่าจะมาถึงเมื่อไร",
    "korean": "제 소포가 늦었는데 아무도 대답하지 않아요 언제 도착하는지 알려주세요",
    "emoji": "😡 😡😡 📦 ❓ 🙏🏽 👨‍👩‍👧 💸",
}
ODD = {
    "digits": "DE89370400440532013000 4111111111111111 2026-11-21 10:00:00 " * 8,
    "one-word": "congratulations " * 200,
    "line": "=" * 3000,
    "spaces": "late" + " " * 3000 + "parcel",
    "one-letter": "a" * 3000,
    "nothing": "",
    "mixed": "Order № 4711 ist noch nicht da 😡 我的包裹在哪里? где посылка?",
}


def text_of(script: str, words: int, seed: int = 0) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS[script].split()) for _ in range(words))


def tokens(engine: TinyEngine, text: str, *, prompt: bool = False) -> int:
    """Count the tokens of *text*, or of the whole prompt with it, as the engine's own tokenizer does."""
    content = f"<|system|>{SYSTEM}<|end|><|user|><conversation>\n{text}\n</conversation><|end|><|assistant|>"
    body = json.dumps({"content": content if prompt else text, "parse_special": True}).encode()
    request = urllib.request.Request(f"{engine.url}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return len(json.load(response)["tokens"])


@pytest.mark.parametrize("script", [script for script in WORDS if script not in ("english", "emoji")])
def test_first_estimate_is_never_too_low(engine: TinyEngine, script: str) -> None:
    """This tokenizer learnt a little English only: in other scripts it makes the most there can be, a token of each byte."""
    estimator = TokenEstimator(SYSTEM)
    for words in (3, 40, 400):
        text = text_of(script, words)
        assert least_tokens(text) <= tokens(engine, text) <= 1.05 * estimator.text_tokens(text) + 10


@pytest.mark.parametrize("text", [*ODD.values(), *(text_of(script, 300) for script in WORDS)], ids=[*ODD, *WORDS])
def test_whole_prompt_is_never_taken_for_a_cut_one(engine: TinyEngine, text: str) -> None:
    """The fewest tokens of a text are fewer than any tokenizer's count."""
    count = tokens(engine, text, prompt=True)
    reply = {"message": {"content": "{}"}, "done": True, "done_reason": "stop", "prompt_eval_count": count}
    messages = chat_messages(SYSTEM, text)
    assert least_prompt_tokens(messages) == sum(least_tokens(message["content"]) for message in messages)
    answered = parse_chat_response(TARGET, 200, json.dumps(reply).encode(), messages)
    assert answered.prompt_tokens == count


@pytest.mark.parametrize(
    "text", [*ODD.values(), "a b c d e", "a " * 2000, "abcdefghijklmnop" * 9 + "q", *map(text_of, WORDS, [40] * 9)]
)
def test_least_tokens_are_not_counted_if_they_are_surely_few_enough(text: str) -> None:
    """The result compares with *enough* as a full count would."""
    messages = chat_messages(SYSTEM, text)
    counted = sum(least_tokens(message["content"]) for message in messages)
    many = sum(len(message["content"]) for message in messages)
    assert least_prompt_tokens(messages, many) == many
    for enough in (counted - 1, counted, counted + 1):
        assert (least_prompt_tokens(messages, enough) > enough) == (counted > enough)


@pytest.mark.parametrize("script", mostly_thorough(["english", "russian", "chinese"], 3, first=2))
def test_estimate_improves_with_answers(engine: TinyEngine, script: str) -> None:
    """From a few answers on it is close above the truth, also for texts ten times as long as those it learnt from."""
    estimator = TokenEstimator(SYSTEM)
    for seed in range(8):
        text = text_of(script, 5 + 20 * seed, seed)
        estimator.learn(text, tokens(engine, text, prompt=True))
    for seed in range(20):
        text = text_of(script, 1500, 100 + seed)
        truth = tokens(engine, text, prompt=True)
        assert truth <= estimator.prompt_tokens(text) <= 1.25 * truth


@pytest.mark.parametrize("text", ["short", "the parcel is late. " * 40, "=" * 5000, "订单" * 300, "12 34 " * 200])
def test_count_of_a_whole_prompt_is_judged_alike_without_the_exact_estimate(text: str) -> None:
    estimator = TokenEstimator(build_system_prompt(load_taxonomy()))
    exact = estimator.least_prompt_tokens(text)
    for counted in (1, int(exact) - 1, int(exact) + 1, 4 * int(exact)):
        assert (counted < estimator.least_prompt_tokens(text, counted)) == (counted < exact)


@pytest.mark.parametrize("text", ["short", "the parcel is late. " * 40, "订单" * 300, "\U0001f4e6" * 300])
def test_text_that_fits_for_certain_has_a_token_for_each_byte_or_the_highest_rates(text: str) -> None:
    estimator = TokenEstimator(build_system_prompt(load_taxonomy()))
    most = min(len(text.encode()), most_tokens(text)) + estimator.system_tokens
    assert estimator.fits(text, int(most) + 1)
    assert not estimator.fits(text, int(most) - 1)


def test_dense_tokenizer_is_learnt_at_once() -> None:
    """A first count above the estimate raises the part that all prompts share."""
    estimator = TokenEstimator("x" * 3000)
    estimator.learn("hello there", 2500)
    assert 2400 <= estimator.system_tokens <= 2600


def test_scripts_are_learnt_separately(engine: TinyEngine) -> None:
    """English answers say nothing about Thai."""
    estimator = TokenEstimator(SYSTEM)
    before = estimator.text_tokens(text_of("thai", 100))
    for seed in range(8):
        text = text_of("english", 5 + 20 * seed, seed)
        estimator.learn(text, tokens(engine, text, prompt=True))
    truth = tokens(engine, text_of("english", 100))
    assert truth <= estimator.text_tokens(text_of("english", 100)) <= 1.25 * truth
    assert estimator.text_tokens(text_of("thai", 100)) == pytest.approx(before, rel=0.1)


@pytest.mark.thorough
def test_refusal_of_a_real_engine_leads_to_a_fitting_prompt(
    tiny_model: Path, tmp_path: Path, mongodb_uri: str, db_name: str
) -> None:
    """llama.cpp over OpenAI's protocol: its window is unknown until it refuses and tells; what fits then is labelled."""
    messages = [{"sender": "customer", "text": f"{number} {WORDS['russian']}"} for number in range(120)]
    documents: list[dict[str, Any]] = [
        {"_id": 1, "messages": messages, "status": "pending"},
        {"_id": 2, "messages": messages[:2], "status": "pending"},
    ]
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[db_name].conversation_set.insert_many(documents)
        with TinyEngine(tiny_model, slots=1, context_tokens=5120) as engine:
            environment = {"LLM_API_URL": f"{engine.url}/v1/chat/completions", "LLM_MODEL": MODEL_NAME}
            stats = run_worker(tmp_path, mongodb_uri, db_name, environment, "--max-concurrent", "2")
        assert (stats["successful"], stats["failed"]) == (2, 0)
        made = {
            r["source_conversation_id"]: r["processing_metadata"] for r in client[db_name].sentimental_analysis.find()
        }
    assert (made[2]["input_complete"], made[2]["turns_used"]) == (True, 2)
    assert made[1]["input_complete"] is False
    assert 5 < made[1]["turns_used"] < 120
    assert made[1]["prompt_tokens"] < 5120
