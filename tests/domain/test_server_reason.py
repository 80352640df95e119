"""The reason that a server gives, as it may be logged."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import load_taxonomy
from domain.server_reason import LEFT_OUT, MAX_CHARACTERS, VOCABULARY, server_reason
from prompt_builder import build_system_prompt

PIXEL = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
TRANSCRIPT = """<conversation>
Customer: Hi, this is Anna Müller, order 88231-B. Where is my parcel from Monday? I am pregnant.
Agent: Sorry about that! Could you send us your address?
Customer: Lindenstraße 5, and I wait. 我的包裹在哪里
</conversation>"""
RULES = build_system_prompt(load_taxonomy())


def reason_of(text: str, secret: str | None = None) -> str:
    """Return the reason of a server that answers with *text* in the form of OpenAI."""
    body = json.dumps({"error": {"message": text}}).encode()
    return server_reason(body, [TRANSCRIPT], instructions=RULES, secret=secret)


@pytest.mark.parametrize(
    "text",
    [
        "response_format is not supported by this model",  # X6
        "llama runner process has terminated: exit status 2",
        "model requires more system memory (9.5 GiB) than is available (3.1 GiB)",
        '"llama3.2" does not support "tools"',
        "Invalid value for 'response_format.json_schema.name': string does not match pattern",
        "This model's maximum context length is 4096 tokens. However, you requested 5012 tokens",
        "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead",
        "unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported",
        "The model `Qwen2.5-Coder-32B-Instruct-GPTQ-Int4` does not exist",
        "Failed to initialize samplers: failed to parse grammar",
        "unable to load model: /root/.ollama/models/blobs/sha256-" + "dde5aa3f" * 8,
        "System role not supported",
        "Error code 401: you must provide an API key",
    ],
)
def test_reasons_of_real_servers_are_kept_word_for_word(text: str) -> None:
    assert reason_of(text) == f"; the server says: {text}"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": "no room"}',
        b'{"error": {"message": "no room", "type": "server_error"}}',
        b'{"message": "no room"}',
        b'{"detail": "no room"}',
        b'{"detail": [{"loc": ["body"], "msg": "no room", "input": "Anna"}]}',
        b'{"error": "{\\"error\\":{\\"code\\":500,\\"message\\":\\"no room\\"}}"}',
        b'[{"error": {"code": 400, "message": "no room"}}]',
        b"no room\r\n",
        b"\x1b[31mno\x1b[0m \x00\x07room\xe2\x80\xae.",
    ],
)
def test_the_words_are_found_in_each_form(body: bytes) -> None:
    expected = "" if b"\0" in body else "; the server says: no room"
    assert server_reason(body) == expected
    assert server_reason(body.replace(b"\0", b"")) == "; the server says: no room"


@pytest.mark.parametrize(
    "body", [b"", b" \n", b"{}", b"[]", b"null", b"5", b'{"error": {}}', b'{"error": 5}', b'{"err', PIXEL]
)
def test_no_reason(body: bytes) -> None:
    assert server_reason(body) == ""


def test_the_page_of_a_proxy_is_called_a_page() -> None:
    page = b"<!DOCTYPE html>\n<html><head><title>502 Bad\nGateway</title></head><body>Anna</body></html>"
    assert server_reason(page) == "; the server says: a web page, 502 Bad Gateway"
    assert server_reason(b"<html><body>Anna</body></html>") == "; the server says: a web page"


def test_reason_is_one_short_line() -> None:
    said = reason_of("line one\nline two\r\n" + "x y " * 500)
    assert "\n" not in said
    assert len(said) <= MAX_CHARACTERS + len("; the server says: ")
    assert said.startswith("; the server says: line one line two x y")
    assert len(server_reason(b'{"error": ' * 50_000)) == 0, "deep nesting is not JSON for orjson"


@pytest.mark.parametrize(
    "text",
    [
        "cannot parse: Where is my parcel from Monday?",
        "cannot parse: where\\nis  MY\\u0020parcel&#32;from%20monday",
        "bad token in 'Could you send us your addr",
        "blocked: I am pregnant",
        "blocked: i  am\npregnant",
        "无效我的包裹在哪里无效",
        f"invalid request {TRANSCRIPT[14:]}",
        f"invalid request {RULES[:200]}",
    ],
)
def test_reason_that_quotes_the_request_is_dropped(text: str) -> None:
    assert reason_of(text) == "; the server's reason quotes the request, so only its own log shows it"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Unexpected token 'Müller' at 12", "Unexpected token '[…]' at 12"),
        ("bad name Anna near 88231", "bad name […] near […]"),
        ('unknown word "wait" in template', 'unknown word "[…]" in template'),
        ("bad street Lindenstra\\u00dfe", "bad street […]"),
        ("contact bob@example.com", "contact ***"),
        ("Failed to parse input at pos 0: the customer is sad", "Failed to parse input at pos […]"),
        ("Validation error {'input': 'he is sad'}", "Validation error […]"),
        ("Invalid <think>he is sad", "Invalid […]"),
        ("cannot parse near could you send", "cannot parse near […]"),
        ("grammar stops at pregnan", "grammar stops at […]"),
        ("invalid word wait and sorry in template", "invalid word […] and […] in template"),
    ],
)
def test_words_that_may_be_a_name_a_number_or_a_quotation_are_left_out(text: str, kept: str) -> None:
    assert reason_of(text) == f"; the server says: {kept}"


WORDS = [*"my husband left me and i am sick of your server it is not the model he died".split(), "tumor", "to", "on"]
SAID = ["invalid request near", "unexpected token", "at", "model is not loaded:", "failed to parse", ""]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=20),
    st.lists(st.tuples(st.sampled_from(SAID), st.integers(0, 20), st.integers(0, 4)), min_size=1, max_size=4),
    st.sampled_from([" ", ", ", "\n", "-"]),
)
def test_no_few_words_of_a_conversation_are_shown(
    message: list[str], quoted: list[tuple[str, int, int]], separator: str
) -> None:
    """Wherever the server quotes them: only its own words stay, alone or in twos."""
    parts = [f"{said} {separator.join(message[start : start + size])}" for said, start, size in quoted]
    body = json.dumps({"error": " ".join(parts)}).encode()
    shown = server_reason(body, [f"<conversation>\nCustomer: {' '.join(message)}\n</conversation>"])
    if shown.startswith("; the server's reason quotes"):
        return
    words = shown.removeprefix("; the server says: ").replace(LEFT_OUT, "|").replace(",", " ").replace("-", " ").split()
    assert not {word.strip(":.") for word in words} & (set(message) - VOCABULARY - {"i"}), shown
    rows = {tuple(message[at : at + 3]) for at in range(len(message) - 2)}
    assert not any(tuple(words[at : at + 3]) in rows for at in range(len(words) - 2)), shown


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-SECRET-1234",
        "Incorrect API key provided: SECRET1234",
        "key sk-ab**********SECRET is wrong",
        "proxy http://user:SECRET@10.0.0.1:3128 failed",
        "proxy http://user:a/b@SECRET@10.0.0.1:3128 failed",
        "GET https://host/v1/models?key=SECRET&b=2 failed",
        "header Authorization: Bearer SECRET.SECRET was refused",
        "Authorization: SECRETSECRET",
        "api_key=SECRET; password: SECRET, client_secret = SECRET",
        '"token": "SECRET"',
        "hf_SECRETSECRET is no key",
        "eyJhbGciOiJSECRET.eyJzdWIi.SECRET",
        "unknown key SECRET0123456789abcdef0123456789",
        "you sent MY-OWN-SECRET",
    ],
)
def test_secrets_are_masked(text: str) -> None:
    said = reason_of(text, secret="MY-OWN-SECRET")
    assert (said.startswith("; the server says: ") and "***" in said) or "?" in text
    assert "SECRET" not in said
