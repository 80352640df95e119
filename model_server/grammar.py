"""GBNF grammars for llama.cpp: the answers of a JSON schema without white space between the tokens. No I/O.

llama.cpp compiles a schema to a grammar that permits a space, or line breaks with blanks, after each token of an answer, and
no field of a schema forbids it. Models that write them take up to three times as many tokens for a list of labels.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import orjson


def bound_answer(schema_json: bytes, *, takes_grammar: bool) -> dict[str, Any]:
    """Return the field of OpenAI's protocol that binds an answer to a schema, or to its grammar if the server takes one."""
    if takes_grammar and (grammar := compact_grammar(schema_json)) is not None:
        return {"grammar": grammar}
    schema = {"name": "triad", "strict": True, "schema": orjson.Fragment(schema_json)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


@functools.lru_cache(maxsize=8)
def compact_grammar(schema_json: bytes) -> str | None:
    """Return the grammar of *schema_json*; None if it has more than objects, arrays and enums, such as a free text."""
    try:
        return f"root ::= {_value(orjson.loads(schema_json))}\n"
    except (KeyError, TypeError, AttributeError):
        return None


def _value(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"({' | '.join(_literal(json.dumps(value, ensure_ascii=False)) for value in schema['enum'])})"
    if schema["type"] == "object":
        properties = schema["properties"].items()
        parts = [f"{_literal(json.dumps(name, ensure_ascii=False) + ':')} {_value(one)}" for name, one in properties]
        return _joined("{", parts, "}")
    if "prefixItems" in schema:
        return _joined("[", [_value(one) for one in schema["prefixItems"]], "]")
    item = _value(schema["items"])
    more = f"({_literal(',')} {item}){{{schema['minItems'] - 1},{schema['maxItems'] - 1}}}"
    return _joined("[", [f"{item} {more}"], "]")


def _joined(start: str, parts: list[str], end: str) -> str:
    between = f" {_literal(',')} "
    return f"{_literal(start)} {between.join(parts)} {_literal(end)}"


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
