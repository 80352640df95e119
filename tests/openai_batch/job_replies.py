"""Answers of the fake OpenAI for the tests of document jobs; each notes the body that it was asked with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HOSTILE_ANSWERS = [
    {"$set": {"admin": True}},
    {"points": {"$gt": ""}},
    {"a.b": 1},
    {"points": [{"x\x00y": 1}]},
    {"": 1},
    {"points": 2**70},
    {"points": "\ud800"},
]


def _note(body: dict[str, Any]) -> str:
    with Path(os.environ["TEST_SENT_FILE"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(body) + "\n")
    return str(body["messages"][-1]["content"])


def echo(body: dict[str, Any]) -> str:
    """The prompt itself."""
    return _note(body)


def careless_echo(body: dict[str, Any]) -> str:
    """The prompt as models repeat placeholders: in lower case, without brackets."""
    return _note(body).lower().replace("<", "").replace(">", "")


def talking_points(body: dict[str, Any]) -> str:
    """JSON with the prompt in it."""
    return json.dumps({"points": [_note(body)], "urgency": "soon"})


def hostile(body: dict[str, Any]) -> str:
    """The JSON whose number the prompt ends in."""
    return json.dumps(HOSTILE_ANSWERS[int(_note(body).rsplit(" ", 1)[1])])


def labels(body: dict[str, Any]) -> str:
    """Labels, with the whole prompt as categorization."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    text = _note(body).replace("\n", " ")
    return json.dumps(
        {name: (text if name == "categorization" else shape["enum"][0]) for name, shape in properties.items()}
    )
