"""The answers of the fake OpenAI to chat and embeddings requests, as the official client sees them."""

import base64
import json
import struct
from typing import Any

import httpx2
import jsonschema_rs
import openai
import pytest

from tests.fakes.fake_ollama import INTENTS, SENTIMENTS, TOPICS, expected_labels
from tests.fakes.fake_openai import FakeOpenAI, expected_content, expected_embedding
from tests.fakes.fake_openai_client import (
    chat_body,
)
from tests.fakes.fake_openai_server.answers import instance_of

_TRIAD = {
    "type": "object",
    "properties": {
        "categorization": {"type": "string"},
        "intent": {"type": "string", "enum": list(INTENTS)},
        "topic": {"type": "string", "enum": list(TOPICS)},
        "sentiment": {"type": "string", "enum": list(SENTIMENTS)},
    },
    "required": ["categorization", "intent", "topic", "sentiment"],
    "additionalProperties": False,
}
_MIXED = {
    "$defs": {"item": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}}},
    "type": "object",
    "required": ["urgency", "items", "note", "when", "share", "kind"],
    "properties": {
        "urgency": {"type": "integer", "minimum": 3, "maximum": 4},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 3},
        "note": {"anyOf": [{"type": "string", "minLength": 40}, {"type": "null"}]},
        "when": {"type": ["string", "null"], "format": "date"},
        "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "kind": {"allOf": [{"type": "string"}, {"enum": ["a", "b"]}]},
    },
}


def _formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_the_support_triad_is_labelled_as_the_fake_ollama_does(client: openai.OpenAI) -> None:
    text = "Customer: where is my parcel?"
    answer = client.chat.completions.create(**chat_body(text, response_format=_formatted(_TRIAD)))
    labels = json.loads(answer.choices[0].message.content or "")
    assert labels == expected_labels(text, INTENTS, TOPICS, SENTIMENTS)


@pytest.mark.parametrize("schema", [_TRIAD, _MIXED])
def test_answers_are_valid_instances_of_the_schema(schema: Any) -> None:
    validator = jsonschema_rs.validator_for(schema)
    kinds = set()
    for number in range(200):
        instance = json.loads(expected_content(chat_body(f"text {number}", response_format=_formatted(schema))))
        validator.validate(instance)
        kinds.add(json.dumps(instance))
    assert len(kinds) > 20, "different texts give different answers"


def test_a_recursive_schema_ends() -> None:
    schema = {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}
    assert isinstance(instance_of(schema, bytes(32)), dict)


def test_replies_can_be_given(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    fake.configure(reply="said: {text}")
    assert client.chat.completions.create(**chat_body("hi")).choices[0].message.content == "said: hi"
    fake.configure(reply="@json:dumps")
    answer = client.chat.completions.create(**chat_body("hi")).choices[0].message.content
    assert json.loads(answer or "") == chat_body("hi")


def test_an_answer_ends_at_the_token_limit_of_its_request(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**chat_body("hi", max_tokens=2))
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", "Answer 8")


def test_embeddings_come_as_packed_floats_and_as_numbers(fake: FakeOpenAI, client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="text-embedding-3-small", input=["a b", "c"])
    plain = client.embeddings.create(model="text-embedding-3-small", input=["a b", "c"], encoding_format="float")
    for place, text in enumerate(["a b", "c"]):
        assert plain.data[place].embedding == pytest.approx(expected_embedding(text, 1536))
        assert packed.data[place].embedding == pytest.approx(expected_embedding(text, 1536), abs=1e-6)
    raw = httpx2.post(
        f"{fake.url}/embeddings",
        json={"model": "text-embedding-3-large", "input": "a", "encoding_format": "base64", "dimensions": 4},
        headers={"Authorization": "Bearer x"},
    ).json()
    assert len(struct.unpack("<4f", base64.b64decode(raw["data"][0]["embedding"]))) == 4
    assert len(client.embeddings.create(model="text-embedding-3-large", input="a").data[0].embedding) == 3072
