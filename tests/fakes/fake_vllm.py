"""A scripted server that answers as vLLM does, as far as the reply style ``score`` and its fallback need it.

From vllm 0.33.0 (commit 4ba787ec9): entrypoints/serve/tokenize/{protocol,serving}.py, entrypoints/openai/completion/
{protocol,serving}.py, entrypoints/serve/engine/protocol.py (a field that is not known is ignored), sampling_params.py
(_validate_logprobs), v1/sample/sampler.py (the drawn token is among the probabilities), renderers/params.py (long prompts).

A token is a word with the space before it, a sign, or a byte of a character beyond ASCII. The vocabulary grows as texts come.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.scripted_server import Handler, ScriptedServer, answer

MODEL = "served"
DRAWN = "The"  # the likeliest token of the whole vocabulary
TOTAL = 1000.0  # weight of the vocabulary
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]


def byte_level(piece: bytes) -> str:
    """Spell a token as GPT-2's vocabulary does."""
    return "".join(chr(byte if byte in _VISIBLE else 256 + _HIDDEN.index(byte)) for byte in piece)


def sentence_piece(piece: bytes) -> str:
    """Spell a token as SentencePiece does."""
    return f"<0x{piece[0]:02X}>" if piece[0] > 127 else piece.decode().replace(" ", "\u2581")


class RefusedError(Exception):
    """An answer with status 400, about the field *param*."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass
class Vllm:
    """The model and its server.

    *weights*: the end of the text before -> token -> its weight, 1 if it is not there. *ids*: what it does with
    ``logprob_token_ids``: "taken", "ignored" as before July 2026, "refused" as by a strict proxy, or "texts only" as by one that
    takes no prompt of tokens. *has_system*: the template has a system role. *finish*: the reason for the end of each call.
    """

    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    ids: str = "taken"
    spelling: Callable[[bytes], str] = byte_level
    window: int = 8192
    has_system: bool = True
    finish: str = "length"
    vocabulary: list[bytes] = field(default_factory=lambda: [DRAWN.encode()])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, handler: Handler) -> None:
        """Answer one request."""
        body = json.loads(handler.body)
        routes = {"/tokenize": self.tokenize, "/v1/completions": self.complete, "/v1/chat/completions": self.chat}
        try:
            if handler.path not in routes:
                answer({"detail": "Not Found"}, 404)(handler)
            elif body["model"] != MODEL:
                error = {"message": "The model does not exist.", "type": "NotFoundError", "code": 404}
                answer({"error": error}, 404)(handler)
            else:
                with self.lock:
                    found = routes[handler.path](body)
                answer(found)(handler)
        except RefusedError as refusal:
            error = {"message": str(refusal), "type": "BadRequestError", "param": refusal.param, "code": 400}
            answer({"error": error}, 400)(handler)

    def numbers(self, text: str) -> list[int]:
        """Cut *text* into tokens."""
        pieces: list[bytes] = []
        for piece in re.findall(r'\["|","|"\]| ?[A-Za-z]+|\s|.', text):
            pieces += [piece.encode()] if piece.isascii() else [bytes([byte]) for byte in piece.encode()]
        self.vocabulary += [piece for piece in dict.fromkeys(pieces) if piece not in self.vocabulary]
        places = {piece: number for number, piece in enumerate(self.vocabulary)}
        return [places[piece] for piece in pieces]

    def rendered(self, messages: list[dict[str, str]]) -> list[int]:
        """Apply the template of the model, up to the answer."""
        return self.numbers("".join(f"<{turn['role']}>{turn['content']}" for turn in messages) + "<assistant>")

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """``/tokenize``, of a text or of messages."""
        if "messages" in body:
            if not self.has_system and body["messages"][0]["role"] == "system":
                raise RefusedError("System role not supported", "messages")
            assert body["chat_template_kwargs"]["enable_thinking"] is False
            found = self.rendered(body["messages"])
        else:
            found = self.numbers("<s>" * body.get("add_special_tokens", True) + body["prompt"])
        names = [self.spelling(self.vocabulary[number]) for number in found]
        return {
            "count": len(found),
            "max_model_len": self.window,
            "tokens": found,
            "token_strs": names if body.get("return_token_strs") else None,
        }

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """``/v1/completions`` with the prompt as tokens."""
        prompt, wanted = body["prompt"], body.get("logprob_token_ids") if self.ids != "ignored" else None
        if wanted and self.ids == "refused":
            raise RefusedError("Extra inputs are not permitted: logprob_token_ids", "logprob_token_ids")
        if self.ids == "texts only":
            raise RefusedError("Input should be a valid string", "prompt")
        if wanted and len(wanted) > 128:
            text = f"Requested logprob_token_ids of length {len(wanted)}, which is greater than max allowed: 128"
            raise RefusedError(text, "logprob_token_ids")
        if not wanted and body["logprobs"] > 20:
            text = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: 20"
            raise RefusedError(text, "logprobs")
        if len(prompt) + body["max_tokens"] > self.window:
            raise RefusedError(
                f"This model's maximum context length is {self.window} tokens. However, your prompt contains {len(prompt)} "
                "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
                "input prompt.",
                "input_tokens",
            )
        text = b"".join(self.vocabulary[number] for number in prompt).decode(errors="replace")
        known = next((weights for end, weights in self.weights.items() if text.endswith(end)), {})
        shown = [0, *(wanted or [])]
        place = {
            f"token_id:{number}": math.log(known.get(self.vocabulary[number].decode("latin-1"), 1.0) / TOTAL)
            for number in shown
        }
        assert body["return_tokens_as_token_ids"] is True
        drawn = self.finish != "abort"
        logprobs = {"tokens": ["token_id:0"] * drawn, "top_logprobs": [place] * drawn}
        choice = {"index": 0, "text": DRAWN * drawn, "logprobs": logprobs, "finish_reason": self.finish}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": int(drawn)}
        return {"object": "text_completion", "model": MODEL, "choices": [choice], "usage": usage}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """``/v1/chat/completions`` with a schema of labels: the first label of each field."""
        schema = body["response_format"]["json_schema"]["schema"]
        labels = [one.get("enum", ["text"])[0] for one in schema.get("prefixItems") or schema["properties"].values()]
        found = labels if "prefixItems" in schema else dict(zip(schema["properties"], labels, strict=True))
        content = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"prompt_tokens": len(self.rendered(body["messages"]))}}


@contextlib.contextmanager
def fake_vllm(vllm: Vllm | None = None) -> Iterator[ScriptedServer]:
    """Run *vllm*; steps that are put on the script of the server come before its answers."""
    card = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 8192}
    server = ScriptedServer(models=answer({"object": "list", "data": [card]}), otherwise=vllm or Vllm())
    server.start()
    try:
        yield server
    finally:
        server.stop()
