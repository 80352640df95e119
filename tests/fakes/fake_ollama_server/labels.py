"""Deterministic answers: pure functions of the text, so that a test or an oracle can compute them too."""

import hashlib
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

INTENTS = (
    "Complaint",
    "Technical Support",
    "Information Request",
    "Order Status",
    "Refund Request",
    "Billing Dispute",
    "Change Request",
    "Cancellation",
    "Purchase/Booking",
    "Account Access",
    "Payment/Transfer",
    "Security/Fraud/Loss",
    "Feedback/Praise",
    "Other",
)
TOPICS = (
    "Account/Billing",
    "Account Access",
    "Shipping/Delivery",
    "Returns/Refunds",
    "Product Information",
    "Technical Issue",
    "Travel Operations",
    "Travel Booking",
    "Baggage/Lost Property",
    "Banking/Cards",
    "Insurance/Loans/Credit",
    "Subscription/Plan",
    "Service Quality",
    "Other",
)
SENTIMENTS = ("Positive", "Neutral", "Negative")

_CHARS_PER_TOKEN = 4
_SURROGATES = re.compile("[\ud800-\udfff]")
_WORDS = re.compile(r"\w+")


def text_digest(text: str) -> bytes:
    """SHA-256 of *text* as the server sees it: a lone surrogate arrives as U+FFFD, as in Go."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = _SURROGATES.sub("\ufffd", text).encode()
    return hashlib.sha256(encoded).digest()


def text_sha256(text: str) -> str:
    """The key of *text* in ``stats()["calls_by_sha"]`` and in ``X-Fake-User-Sha256``."""
    return text_digest(text).hex()


def labels_from_digest(
    digest: bytes, intents: Sequence[str], topics: Sequence[str], sentiments: Sequence[str]
) -> dict[str, str]:
    """Labels chosen by *digest*; the categorization ends with its first 8 hex digits."""
    intent = intents[int.from_bytes(digest[0:4], "big") % len(intents)]
    topic = topics[int.from_bytes(digest[4:8], "big") % len(topics)]
    sentiment = sentiments[int.from_bytes(digest[8:12], "big") % len(sentiments)]
    return {
        "categorization": f"{intent} about {topic}, case {digest.hex()[:8]}",
        "intent": intent,
        "topic": topic,
        "sentiment": sentiment,
    }


def expected_labels(
    text: str, intents: Sequence[str], topics: Sequence[str], sentiments: Sequence[str]
) -> dict[str, str]:
    """The answer the fake gives for the user message *text*.

    Args:
        text: Whole content of the user message that the knob ``user_message`` selects (the longest one
            unless configured otherwise), fences and all.
        intents: ``enum`` of ``intent`` in the schema sent, in its order; likewise *topics*, *sentiments*.

    Returns:
        ``{"categorization", "intent", "topic", "sentiment"}``.
    """
    return labels_from_digest(text_digest(text), intents, topics, sentiments)


def answer_from_schema(schema: Mapping[str, Any] | None, digest: bytes, array_noise: float = 0.0) -> dict[str, Any]:
    """An object that fits *schema*, keys in the order of ``properties``; None means the built-in taxonomy.

    The keys of an array with ``prefixItems`` are the first three fields, then ``value 4`` and so on. In a share of
    *array_noise* of the arrays, which depends on the text alone, the first label is another one.
    """
    if schema is not None and (properties := array_properties(schema)):
        answer = answer_from_schema({**schema, "properties": properties, "prefixItems": None}, digest)
        first, names = next(iter(properties.items()))
        if "enum" in names and probability_hit(7, digest, array_noise):
            answer[first] = names["enum"][(names["enum"].index(answer[first]) + 1) % len(names["enum"])]
        return answer
    properties = schema.get("properties") if schema else None
    if not isinstance(properties, dict) or not properties or schema is None:
        return labels_from_digest(digest, INTENTS, TOPICS, SENTIMENTS)
    labels = labels_from_digest(
        digest,
        _enum(properties.get("intent"), schema) or INTENTS,
        _enum(properties.get("topic"), schema) or TOPICS,
        _enum(properties.get("sentiment"), schema) or SENTIMENTS,
    )
    return {
        name: labels[name] if name in labels else _sample(name, _resolved(prop, schema), schema, digest)
        for name, prop in properties.items()
    }


def array_properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an array with ``prefixItems`` by name, empty for other schemas."""
    items = schema.get("prefixItems") if schema.get("type") == "array" else None
    names = ("intent", "topic", "sentiment", *(f"value {number}" for number in range(4, len(items or ()) + 1)))
    return dict(zip(names, items or (), strict=False))


def _resolved(prop: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """*prop* itself, or what its ``$ref`` points to inside *root*."""
    while isinstance(prop, dict) and isinstance(reference := prop.get("$ref"), str):
        target: Any = root
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part, {})
        prop = target
    return prop if isinstance(prop, dict) else {}


def _enum(prop: Any, root: Mapping[str, Any]) -> Sequence[str] | None:
    values = _resolved(prop, root).get("enum") if prop is not None else None
    return values if isinstance(values, list) else None


def _sample(name: str, prop: Mapping[str, Any], root: Mapping[str, Any], digest: bytes) -> Any:
    """A value that fits one property of a schema we know nothing about."""
    number = int.from_bytes(digest[12:16], "big") ^ zlib.crc32(name.encode())
    if isinstance(values := prop.get("enum"), list) and values:
        return values[number % len(values)]
    if "const" in prop:
        return prop["const"]
    kind = prop.get("type", "string")
    if kind == "object":
        nested = prop.get("properties", {})
        return {key: _sample(key, _resolved(value, root), root, digest) for key, value in nested.items()}
    if kind == "array":
        item = _sample(name, _resolved(prop.get("items"), root), root, digest)
        return [item] * int(prop.get("minItems", 1))
    scalars: dict[str, Any] = {
        "integer": int(prop.get("minimum", 0)) + number % 5,
        "number": (number % 1000) / 1000,
        "boolean": bool(number % 2),
        "null": None,
    }
    return scalars[kind] if kind in scalars else f"{name} {digest.hex()[:8]}"


def unit_interval(seed: int, key: int | str | bytes) -> float:
    """A number in [0, 1) that depends on *seed* and *key* alone; a text counts by its digest."""
    return _fractions(seed, key)[0]


def probability_hit(seed: int, key: int | str | bytes, probability: float) -> bool:
    """Return whether a fault with this probability and seed strikes the request *key*, its index or its text."""
    return unit_interval(seed, key) < probability


def lognormal_latency(seed: int, key: int | str | bytes, mean_s: float, sigma: float) -> float:
    """Seconds that the model "thinks" about one request; reproducible, with mean *mean_s*.

    Args:
        key: Sequence number of the request (``latency_key="index"``), or the text of the selected user
            message or its digest (``latency_key="text"``), which is independent of the order of arrival.
        sigma: Standard deviation of the logarithm; 0 gives *mean_s* every time.
    """
    uniform, angle = _fractions(seed, key)
    gauss = math.sqrt(-2.0 * math.log(1.0 - uniform)) * math.cos(2.0 * math.pi * angle)
    return mean_s * math.exp(sigma * gauss - sigma * sigma / 2.0)


def _fractions(seed: int, key: int | str | bytes) -> tuple[float, float]:
    if isinstance(key, str):
        key = text_digest(key)
    name = key.hex() if isinstance(key, bytes) else str(key)
    raw = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(raw[:7], "big") / 2**56, int.from_bytes(raw[7:14], "big") / 2**56


def estimate_tokens(char_count: int) -> int:
    """Tokens of a text of *char_count* characters: a quarter, rounded up."""
    return -(-char_count // _CHARS_PER_TOKEN)


def fake_embedding(text: str, dimensions: int) -> list[float]:
    """Unit vector of *text*; texts that share words lie near each other, so searches mean something."""
    vector = [0.0] * dimensions
    digest = text_digest(text)
    vector[int.from_bytes(digest[:4], "big") % dimensions] += 0.1
    for word in _WORDS.findall(text.lower()):
        place = zlib.crc32(word.encode())
        vector[place % dimensions] += 1.0 if place & 0x80000000 else -1.0
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector] if norm else [1.0] + [0.0] * (dimensions - 1)
