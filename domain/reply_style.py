"""The styles of a model's answer, from the longest to the shortest. No I/O.

* ``full``: an object with a sentence about the conversation, then the labels;
* ``labels``: the object without the sentence;
* ``list``: an array of the labels, in the order of the fields. A multi-valued field is an array inside it;
* ``score``: the same array, which the client makes of the most probable labels; see model_server.scores.

Every style gives the same Classification, all but ``full`` one without a categorization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from config import Taxonomy
from config.taxonomy import Field
from domain.text import counted

ReplyStyle = Literal["full", "labels", "list", "score"]

STYLES: tuple[ReplyStyle, ...] = get_args(ReplyStyle)
# What a server that does not offer a style gets instead.
LONGER: dict[ReplyStyle, ReplyStyle] = {"score": "list", "list": "labels"}
MAX_CATEGORIZATION_CHARACTERS = 200


def is_array(style: ReplyStyle) -> bool:
    """Return whether an answer in *style* is an array of labels."""
    return style in ("list", "score")


def answered(taxonomy: Taxonomy, style: ReplyStyle) -> Taxonomy:
    """Return *taxonomy* with only the keys that an answer in *style* has."""
    return taxonomy if style == "full" else replace(taxonomy, has_categorization=False)


def answer_form(taxonomy: Taxonomy, style: ReplyStyle) -> str:
    """Return the form of an answer, as the prompt shows it."""
    if is_array(style):
        values = (f'["<{field.name}>"]' if field.is_multiple else f'"<{field.name}>"' for field in taxonomy.fields)
        return f"[{','.join(values)}]"
    multiple = {field.name for field in taxonomy.fields if field.is_multiple}
    comma, colon = (", ", ": ") if style == "full" else (",", ":")
    shown = (f'"{key}"{colon}' + ('["..."]' if key in multiple else '"..."') for key in answered(taxonomy, style).keys)
    return f"{{{comma.join(shown)}}}"


def answer_name(taxonomy: Taxonomy, style: ReplyStyle) -> str:
    """Return what an answer in *style* is, for the prompt and for repair turns: "JSON object" and the like."""
    if is_array(style):
        return f"JSON array of {counted(len(taxonomy.fields), 'value')} ({_enumeration(taxonomy.field_names)})"
    return "JSON object"


def required_form(taxonomy: Taxonomy, style: ReplyStyle) -> str:
    """Return the form of an answer in words, for a repair turn."""
    if is_array(style):
        return f"one {answer_name(taxonomy, style)}, without keys,"
    *others, last = answered(taxonomy, style).keys
    keys = f"keys {', '.join(others)} and {last}" if others else f"key {last}"
    return f"one JSON object with exactly the {keys},"


def example_answer(answer: Mapping[str, Any], taxonomy: Taxonomy, style: ReplyStyle) -> str:
    """Return *answer*, with the keys of a full answer, as the model would write it in *style*.

    The short styles have no white space: a model copies it from the examples, and each piece costs a token.
    """
    kept = {key: value for key, value in answer.items() if key in answered(taxonomy, style).keys}
    if style == "full":
        return json.dumps(kept, ensure_ascii=False)
    value = [kept[name] for name in taxonomy.field_names if name in kept] if is_array(style) else kept
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def answer_schema(taxonomy: Taxonomy, style: ReplyStyle) -> dict[str, Any]:
    """Return the JSON Schema of an answer; see ``classifier.classification_schema``."""
    fields = [_field_schema(field) for field in taxonomy.fields]
    if is_array(style):
        # No ``items`` beside prefixItems: llama.cpp would read that alone. Its grammar takes exactly these values.
        schema = {"type": "array", "prefixItems": fields, "minItems": len(fields), "maxItems": len(fields)}
        # The schema of ``score`` is sent to no server; its title gives it another fingerprint than ``list``.
        return schema | {"title": "score"} if style == "score" else schema
    text = {"type": "string", "minLength": 1, "maxLength": MAX_CATEGORIZATION_CHARACTERS}
    shown = answered(taxonomy, style)
    return {
        "type": "object",
        "properties": {
            **({"categorization": text} if shown.has_categorization else {}),
            **dict(zip(taxonomy.field_names, fields, strict=True)),
        },
        "required": list(shown.keys),
        "additionalProperties": False,
    }


def _field_schema(field: Field) -> dict[str, Any]:
    one = {"type": "string", "enum": list(field.names)}
    if not field.is_multiple:
        return one
    # The limit ends the list of a model that repeats a label for ever.
    return {"type": "array", "items": one, "minItems": 1, "maxItems": len(field.labels)}


def _enumeration(names: tuple[str, ...]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}, in this order" if others else last
