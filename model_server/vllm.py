"""Builds the requests to vLLM for the reply style ``score``, and reads its answers. No I/O.

Facts: vllm 0.33.0 (commit 4ba787ec9), vllm/entrypoints/serve/tokenize, vllm/entrypoints/openai/completion/protocol.py and
serving.py, vllm/sampling_params.py. Never run against a vLLM. Servers before July 2026 (vllm-project/vllm#43463) ignore
``logprob_token_ids``, as they do any field that they do not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from domain.conversation import Message
from error_handler import LLMUnavailableError
from model_server.protocol import first_choice
from model_server.refusals import context_refusal

MOST_IDS = 128  # of logprob_token_ids in a request: MAX_LOGPROB_TOKEN_IDS
_ID = "token_id:"  # before the number of a token, where the answer would have its text
_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
# Byte-level vocabularies (GPT-2, Llama 3, Qwen) write each byte as a visible character, others a space as this one.
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}
_SPACE = "\u2581"


def prompt_body(messages: list[Message], template_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body, without the model, of ``/tokenize`` for the prompt that the template makes of *messages*."""
    return {
        "messages": messages,
        "add_generation_prompt": True,
        "chat_template_kwargs": template_options,
        "return_token_strs": True,
    }


def text_body(text: str) -> dict[str, Any]:
    """Return the body, without the model, of ``/tokenize`` for a text within an answer."""
    return {"prompt": text, "add_special_tokens": False, "return_token_strs": True}


def read_tokens(answer: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return the number of each token and its spelling in the vocabulary.

    Raises:
        LookupError, TypeError, ValueError: The answer of ``/tokenize`` has another form.
    """
    return [(int(number), str(name)) for number, name in zip(answer["tokens"], answer["token_strs"], strict=True)]


def pieces_of(names: Sequence[str]) -> list[list[bytes]]:
    """Return the bytes of the tokens *names*, in each way in which vocabularies spell them."""
    readings = [[_sentence_piece(name) for name in names]]
    with suppress(KeyError):
        readings.append([bytes(_BYTES[character] for character in name) for name in names])
    return readings


def probability_body(before: Sequence[str | int], numbers: Sequence[int]) -> dict[str, Any]:
    """Return the body, without the model, of ``/v1/completions`` for the probabilities of the tokens *numbers* after *before*."""
    return {
        "prompt": before,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,  # logprob_token_ids needs it. A server that ignores those gives one or two tokens
        "logprob_token_ids": numbers,
        "return_tokens_as_token_ids": True,
    }


def refuses_probabilities(status: int, body: bytes) -> bool:
    """Return whether an answer to ``probability_body`` refuses its fields: only the length differs between conversations."""
    text = body[:4000].decode("utf-8", "replace")
    return status in (400, 422) and ("logprob" in text or context_refusal(text, 1) is None)


def read_logprobs(answer: dict[str, Any]) -> dict[int, float]:
    """Return the logarithm of the probability of each token in the *answer*, by number.

    Raises:
        LLMUnavailableError: The server stopped before the token.
        LookupError, TypeError, ValueError, AttributeError: The answer has another form.
    """
    choice = first_choice(answer)
    if choice.get("finish_reason") == "abort":
        raise LLMUnavailableError("the model server aborted the call; it may be stopping")
    [place] = choice["logprobs"]["top_logprobs"]
    return {int(name.removeprefix(_ID)): float(value) for name, value in place.items()}


def _sentence_piece(name: str) -> bytes:
    if found := _PIECE.fullmatch(name):
        return bytes.fromhex(found[1])
    return name.replace(_SPACE, " ").encode()
