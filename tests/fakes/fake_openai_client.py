"""The requests that the tests of the fake OpenAI send, with the official client."""

import json
from collections.abc import Iterable
from typing import Any, Final

import openai
from openai.types import Batch

from tests.fakes.fake_openai import FakeOpenAI

CHAT: Final = "/v1/chat/completions"
MODEL = "gpt-4o-mini"
A_DAY_S = 86_400


def client_of(fake: FakeOpenAI, **options: Any) -> openai.OpenAI:
    """A client that repeats nothing by itself."""
    settings: dict[str, Any] = {"api_key": "sk-test", "max_retries": 0, "timeout": 20.0} | options
    return openai.OpenAI(base_url=fake.url, **settings)


def chat_body(text: str, **fields: Any) -> dict[str, Any]:
    """Body of one chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]} | fields


def jsonl(bodies: dict[str, Any], url: str = CHAT) -> bytes:
    """A batch file; keys are custom ids."""
    lines = ({"custom_id": key, "method": "POST", "url": url, "body": body} for key, body in bodies.items())
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def documents(count: int) -> dict[str, Any]:
    """*count* chat bodies, ``doc-0`` first."""
    return {f"doc-{number}": chat_body(f"text {number}") for number in range(count)}


def upload(client: openai.OpenAI, raw: bytes, purpose: Any = "batch") -> str:
    """Id of the new file."""
    return client.files.create(file=("input.jsonl", raw), purpose=purpose).id


def submit(client: openai.OpenAI, raw: bytes, endpoint: Any = CHAT, **fields: Any) -> Batch:
    """Upload and create."""
    file_id = upload(client, raw)
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **fields)


def finished(fake: FakeOpenAI, raw: bytes, seconds: float = 1000.0, **fields: Any) -> Batch:
    """Submit, let virtual time pass, and look."""
    with client_of(fake) as client:
        batch = submit(client, raw, **fields)
        fake.advance(seconds)
        return client.batches.retrieve(batch.id)


def content(fake: FakeOpenAI, file_id: str | None) -> bytes:
    """Bytes of a result file; none for none."""
    if not file_id:
        return b""
    with client_of(fake) as client:
        return client.files.content(file_id).read()


def lines_of(raw: bytes) -> list[dict[str, Any]]:
    """The objects of a result file."""
    return [json.loads(line) for line in raw.splitlines()]


def results(fake: FakeOpenAI, batch: Batch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of the output file and of the error file."""
    return lines_of(content(fake, batch.output_file_id)), lines_of(content(fake, batch.error_file_id))


def ids(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Their custom ids, sorted."""
    return sorted(line["custom_id"] for line in lines)


def text_of(line: dict[str, Any]) -> str | None:
    """``message.content`` of a result line."""
    answer: str | None = line["response"]["body"]["choices"][0]["message"]["content"]
    return answer


def strike(fake: FakeOpenAI, kind: str, **params: Any) -> None:
    """Configure one fault, in the place of all others."""
    fake.configure(faults=[{"kind": kind, **params}])
