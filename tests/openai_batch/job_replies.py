"""Answers of the fake OpenAI for the tests of document jobs; each records the request body."""

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
    """Return the prompt itself."""
    return _note(body)


def careless_echo(body: dict[str, Any]) -> str:
    """Return the prompt with placeholders as models rewrite them: in lower case, without brackets."""
    return _note(body).lower().replace("<", "").replace(">", "")


def talking_points(body: dict[str, Any]) -> str:
    """Return JSON with the prompt in it."""
    return json.dumps({"points": [_note(body)], "urgency": "soon"})


def hostile(body: dict[str, Any]) -> str:
    """Return the hostile JSON whose number the prompt ends with."""
    return json.dumps(HOSTILE_ANSWERS[int(_note(body).rsplit(" ", 1)[1])])


def labels(body: dict[str, Any]) -> str:
    """Return labels, with the whole prompt as categorization."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    text = _note(body).replace("\n", " ")
    return json.dumps(
        {name: (text if name == "categorization" else shape["enum"][0]) for name, shape in properties.items()}
    )
