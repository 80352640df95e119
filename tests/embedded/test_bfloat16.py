"""The encoder in bfloat16: where it is used, and how near its vectors are to the exact ones."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="requirements-embedding.txt is not installed")
pytest.importorskip("tokenizers", reason="requirements-embedding.txt is not installed")

from embedded import bfloat16
from embedded.minilm import PACKAGE, open_encoder

TEXTS = (
    "My card was charged twice.",
    "Ich möchte mein Geld zurück, bitte!",
    "@shop still no parcel, order 4711, three weeks now and nobody answers my mails or the phone. Please help me!",
    "ok",
)

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="requirements-local-embedding.txt is not installed"
)


@needs_model
def test_vectors_are_nearly_the_exact_ones() -> None:
    """With padding; numkong has kernels for processors without AMX, too."""
    pytest.importorskip("numkong", reason="requirements-student.txt is not installed")
    exact, near = open_encoder(), open_encoder(bfloat16.bfloat16())
    ids = exact.token_ids(TEXTS)
    cosines = (exact.forward(ids) * near.forward(ids)).sum(axis=1)
    assert cosines.min() > 0.9998
    assert cosines.max() < 1.00001


@pytest.mark.parametrize(
    ("processor", "installed", "is_used"),
    [("amx_tile amx_bf16", True, True), ("amx_bf16", False, False), ("avx512_bf16", True, False), (None, True, False)],
    ids=["amx", "no package", "no amx", "no linux"],
)
def test_it_is_used_only_where_it_is_fast(
    processor: str | None, installed: bool, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the training goes on in float32."""
    if is_used:
        pytest.importorskip("numkong", reason="requirements-student.txt is not installed")
    file = tmp_path / "cpuinfo"
    if processor:
        file.write_text(f"flags\t\t: fpu {processor} flush_l1d\n")
    found: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(bfloat16, "PROCESSOR", file)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: installed or None if name == bfloat16.PACKAGE else found(name),
    )
    assert (bfloat16.bfloat16_if_fast() is not None) is is_used


def test_gelu_is_near_the_exact_one() -> None:
    """Also far from zero, where the fitted polynomial no longer holds."""
    y = np.linspace(-30, 30, 20_011, dtype=np.float32)
    exact = [0.5 * one * math.erfc(-one / math.sqrt(2)) for one in y.tolist()]
    found = bfloat16._gelu(y[:, None] - 1, np.ones(1, np.float32))[:, 0]
    assert np.abs(found - exact).max() < 3e-5
