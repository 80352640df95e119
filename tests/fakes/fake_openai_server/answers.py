"""Deterministic answers: pure functions of a request body, so that a test or an oracle can compute them too."""

import base64
import hashlib
import importlib
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from tests.fakes.fake_ollama_server.labels import INTENTS, SENTIMENTS, TOPICS, labels_from_digest, text_digest

NATIVE_DIMENSIONS = {"text-embedding-3-large": 3072}
_DEFAULT_DIMENSIONS = 1536
_WORDS = re.compile(r"\w+")
_MAX_DEPTH = 12
_TRIAD: dict[str, Sequence[str]] = {"intent": INTENTS, "topic": TOPICS, "sentiment": SENTIMENTS}
_FORMATS = {
    "date": "2026-11-{day:02d}",
    "date-time": "2026-11-{day:02d}T12:00:00Z",
    "time": "12:00:00Z",
    "email": "user{number}@example.com",
    "uuid": "00000000-0000-4000-8000-{number:012d}",
    "uri": "https://example.com/{number}",
    "ipv4": "192.0.2.{day}",
}


def estimate_tokens(text: str) -> int:
    """Tokens of *text*: a quarter of its UTF-8 bytes, rounded up."""
    return -(-len(text.encode(errors="replace")) // 4)


def message_texts(body: Mapping[str, Any], role: str | None = None) -> list[str]:
    """Texts of the messages, of *role* only where given; the text parts of one message are joined."""
    texts = []
    for message in body.get("messages") or ():
        if not isinstance(message, dict) or (role is not None and message.get("role") != role):
            continue
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        texts.append(str(content))
    return texts


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """Estimated prompt tokens of a chat or embeddings body; what the enqueued-token limit counts."""
    if "input" in body:
        return sum(tokens for _, tokens in embedding_inputs(body["input"]))
    return sum(estimate_tokens(text) + 4 for text in message_texts(body)) + 3


def expected_content(body: Mapping[str, Any], reply: str | None = None) -> str:
    """``message.content`` that the fake gives for a chat body.

    The longest user message decides. With a JSON schema in ``response_format``: a valid instance, in which
    ``intent``, ``topic`` and ``sentiment`` are those that `FakeOllama` would give for the same message; with
    ``json_object``: the built-in triad; else a line of text. *reply* is the knob of that name.
    """
    texts = message_texts(body, "user") or message_texts(body) or [""]
    text = max(texts, key=len)
    if reply is not None:
        return _from_template(reply, text, body)
    digest = text_digest(text)
    response_format = body.get("response_format")
    kind = response_format.get("type") if isinstance(response_format, dict) else "text"
    if kind == "json_schema":
        schema = response_format.get("json_schema", {}).get("schema", {}) if isinstance(response_format, dict) else {}
        return orjson.dumps(instance_of(schema, digest)).decode()
    if kind == "json_object":
        return orjson.dumps(labels_from_digest(digest, INTENTS, TOPICS, SENTIMENTS)).decode()
    return f"Answer {digest.hex()[:8]} to {len(text)} characters."


def _from_template(reply: str, text: str, body: Mapping[str, Any]) -> str:
    if reply.startswith("@"):
        module, _, name = reply[1:].partition(":")
        return str(getattr(importlib.import_module(module), name)(dict(body)))
    return reply.replace("{text}", text).replace("{digest}", text_digest(text).hex()[:8])


def instance_of(schema: Mapping[str, Any], digest: bytes) -> Any:
    """A valid instance of *schema*, chosen by *digest*; patterns and ``not`` are not understood."""
    return _instance(schema, schema, digest, "", 0)


def _instance(schema: Any, root: Mapping[str, Any], digest: bytes, name: str, depth: int) -> Any:
    schema = _resolved(schema, root)
    number = int.from_bytes(digest[12:16], "big") ^ zlib.crc32(name.encode())
    if "const" in schema:
        return schema["const"]
    if values := schema.get("enum"):
        if name in _TRIAD and all(isinstance(value, str) for value in values):
            return labels_from_digest(digest, *(values if name == key else _TRIAD[key] for key in _TRIAD))[name]
        return values[number % len(values)]
    for choice in ("anyOf", "oneOf"):
        if options := schema.get(choice):
            pick = options[number % len(options)] if depth < _MAX_DEPTH else _shallow(options, root)
            return _instance(pick, root, digest, name, depth + 1)
    kind = schema.get("type") or ("object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = kind[number % len(kind)]
    makers: dict[str, Callable[[], Any]] = {
        "object": lambda: _object(schema, root, digest, depth),
        "array": lambda: _array(schema, root, digest, name, depth),
    }
    return makers.get(kind, lambda: _scalar(kind, schema, digest, name, number))()


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], digest: bytes, depth: int) -> dict[str, Any]:
    required = schema.get("required", ())
    return {
        key: _instance(value, root, digest, key, depth + 1)
        for key, value in schema.get("properties", {}).items()
        if depth < _MAX_DEPTH or key in required
    }


def _array(schema: Mapping[str, Any], root: Mapping[str, Any], digest: bytes, name: str, depth: int) -> list[Any]:
    count = int(schema.get("minItems", 0 if depth >= _MAX_DEPTH else min(2, schema.get("maxItems", 2))))
    items = schema.get("items", {})
    return [
        _instance(items, root, hashlib.sha256(digest + bytes([place % 256])).digest(), name, depth + 1)
        for place in range(count)
    ]


def _scalar(kind: str, schema: Mapping[str, Any], digest: bytes, name: str, number: int) -> Any:
    if kind == "boolean":
        return bool(number % 2)
    if kind == "null":
        return None
    if kind in ("integer", "number"):
        return _number(kind, schema, number)
    if name == "categorization":
        return labels_from_digest(digest, INTENTS, TOPICS, SENTIMENTS)["categorization"]
    if pattern := _FORMATS.get(schema.get("format", "")):
        return pattern.format(day=1 + number % 28, number=number)
    text = f"{name or 'value'} {digest.hex()[:8]}".ljust(int(schema.get("minLength", 0)), ".")
    return text[: int(schema.get("maxLength", len(text)))]


def _number(kind: str, schema: Mapping[str, Any], number: int) -> int | float:
    step = schema.get("multipleOf", 1 if kind == "integer" else 0.25)
    low, high = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + step
    if "exclusiveMaximum" in schema:
        high = schema["exclusiveMaximum"] - step
    if low is None:
        low = 0 if high is None or high >= 0 else high
    first = math.ceil(low / step)
    last = first + 4 if high is None else max(first, math.floor(high / step))
    value = (first + number % (last - first + 1)) * step
    return int(value) if kind == "integer" else float(value)


def _resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """*schema* with its reference followed and its ``allOf`` merged."""
    while isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for part in reference.lstrip("#").strip("/").split("/"):
            target = target.get(part, {}) if part else target
        schema = target
    if not isinstance(schema, dict):
        return {}
    if "allOf" in schema:
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            for key, value in _resolved(part, root).items():
                known = merged.get(key)
                merged[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
        return merged
    return schema


def _shallow(options: Sequence[Any], root: Mapping[str, Any]) -> Any:
    """The option that ends a recursion soonest."""
    kinds = [_resolved(option, root).get("type") for option in options]
    return options[kinds.index("null")] if "null" in kinds else options[0]


def chat_completion(body: Mapping[str, Any], request_id: str, created: int, reply: str | None) -> dict[str, Any]:
    """A whole answer of /v1/chat/completions; cut at ``max_completion_tokens`` or ``max_tokens``, as there."""
    content = expected_content(body, reply)
    tokens = estimate_tokens(content)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    finish = "stop"
    if isinstance(limit, int) and tokens > limit:
        content = content.encode()[: limit * 4].decode(errors="ignore")
        tokens, finish = limit, "length"
    prompt = prompt_tokens(body)
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": created,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_fake",
    }


# Embeddings


def embedding_inputs(given: Any) -> list[tuple[str, int]]:
    """Texts of an ``input`` and their tokens; token lists become the text of their numbers.

    Raises:
        ValueError: It is none of: a text, texts, tokens, lists of tokens.
    """
    if isinstance(given, str):
        return [(given, estimate_tokens(given))]
    if not isinstance(given, list) or not given:
        raise ValueError("input must be a text or a list that is not empty")
    if all(isinstance(item, str) for item in given):
        return [(item, estimate_tokens(item)) for item in given]
    if all(isinstance(item, int) for item in given):
        return [(" ".join(map(str, given)), len(given))]
    if all(isinstance(item, list) and all(isinstance(token, int) for token in item) for item in given):
        return [(" ".join(map(str, item)), len(item)) for item in given]
    raise ValueError("input mixes types")


def native_dimensions(model: str) -> int:
    """Length of the vectors of *model* when the request does not say."""
    return NATIVE_DIMENSIONS.get(model, _DEFAULT_DIMENSIONS)


def sparse_vector(text: str, dimensions: int) -> dict[int, float]:
    """`expected_embedding` without its zeros: ``{place: number}``."""
    digest = text_digest(text)
    vector: dict[int, float] = {int.from_bytes(digest[:4], "big") % dimensions: 0.1}
    for word in _WORDS.findall(text.lower()):
        place = zlib.crc32(word.encode())
        vector[place % dimensions] = vector.get(place % dimensions, 0.0) + (1.0 if place & 0x80000000 else -1.0)
    norm = math.sqrt(sum(value * value for value in vector.values()))
    return {place: value / norm for place, value in vector.items()} if norm else {0: 1.0}


def expected_embedding(text: str, dimensions: int) -> list[float]:
    """Unit vector of *text*; texts that share words lie near each other, so searches mean something."""
    vector = [0.0] * dimensions
    for place, value in sparse_vector(text, dimensions).items():
        vector[place] = value
    return vector


def packed_embedding(sparse: Mapping[int, float], dimensions: int) -> str:
    """Base64 of little-endian 32-bit floats, the form that the official client asks for."""
    raw = bytearray(4 * dimensions)
    for place, value in sparse.items():
        struct.pack_into("<f", raw, 4 * place, value)
    return base64.b64encode(raw).decode()
