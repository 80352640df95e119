"""Arithmetic of the encoder on processors with AMX: products in bfloat16, by numkong.

Only the training of a student uses it. A product takes a fifth of the time; the sums are float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from embedded.minilm import Arithmetic, Numbers, Product

PACKAGE = "numkong"
PROCESSOR = Path("/proc/cpuinfo")
GELU_ROWS = 32
# Phi(y) = (1 + tanh(y * (A + B y^2 + C y^4))) / 2, fitted to the least error of y * Phi(y): 2.6e-5. It holds for |y| <= 6.
A, B, C = (np.float32(value) for value in (7.97507882e-01, 3.70056481e-02, -3.51517119e-04))
MOST_SQUARE = np.float32(36.0)


def bfloat16_if_fast() -> Arithmetic | None:
    """Return the arithmetic in bfloat16; None unless the package is installed and the processor has AMX.

    The list of the kernel decides: an old one ends a process that uses AMX, which the processor may have all the same.
    """
    try:
        has_amx = " amx_bf16" in PROCESSOR.read_text(encoding="utf-8")
    except OSError:  # another system than Linux
        return None
    return bfloat16() if has_amx and importlib.util.find_spec(PACKAGE) else None


def bfloat16() -> Arithmetic:
    """Return the arithmetic in bfloat16; without AMX it is slower than float32. The package must be installed."""
    numkong: Any = importlib.import_module(PACKAGE)

    def product_with(matrix: Numbers) -> Product:
        packed = numkong.dots_pack(numkong.astype(np.ascontiguousarray(matrix.T), "bfloat16"), "bf16")
        return lambda x: np.asarray(numkong.dots_packed(numkong.astype(x, "bfloat16"), packed))

    return Arithmetic("bfloat16", product_with, _gelu)


def _gelu(x: Numbers, bias: Numbers) -> Numbers:
    """Return ``y * Phi(y)`` of ``y = x + bias``, computed in *x*: half the steps of the exact one."""
    for start in range(0, len(x), GELU_ROWS):
        y = x[start : start + GELU_ROWS]
        y += bias
        square = y * y
        np.minimum(square, MOST_SQUARE, out=square)
        inner = square * C
        inner += B
        inner *= square
        inner += A
        inner *= y
        np.tanh(inner, out=inner)
        inner += np.float32(1.0)
        inner *= np.float32(0.5)
        y *= inner
    return x
