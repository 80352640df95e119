"""The settings decide which provider opens; only its own packages are needed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from config.index_settings import load_index_settings
from embedding_index.providers import open_provider
from error_handler import ConfigurationError
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_openai import FakeOpenAI

ROOT = Path(__file__).parents[2]


def test_openai_by_the_file(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    with FakeOpenAI(api_keys=["sk-file"]) as fake:
        dotenv.write_text(f"EMBEDDING_PROVIDER=openai\nOPENAI_API_KEY=sk-file\nOPENAI_BASE_URL={fake.url}\n")
        with closing(open_provider(load_index_settings(dotenv), dotenv)) as provider:
            assert provider.identity.provider == "openai"
            assert len(provider.embed(["a"]).vectors[0]) == 1536


def test_ollama_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOllama() as fake:
        monkeypatch.setenv("OLLAMA_ENDPOINT", fake.url)
        with closing(open_provider(load_index_settings(None), None)) as provider:
            assert provider.identity.provider == "ollama"
            assert len(provider.embed(["a"]).vectors[0]) == 768


@pytest.mark.parametrize(
    ("name", "package"),
    mostly_thorough([("openai", "httpx2"), ("ollama", "requests"), ("local", "tokenizers"), ("ollama", "numpy")], 4),
)
def test_a_missing_package_is_one_sentence(name: str, package: str) -> None:
    """The check runs in a new process, because nothing is loaded there."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from config.index_settings import load_index_settings\n"
        "from embedding_index.providers import open_provider\n"
        "from error_handler import ConfigurationError\n"
        f"try: open_provider(load_index_settings(None, provider={name!r}), None)\n"
        "except ConfigurationError as exc: print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == (
        f"EMBEDDING_PROVIDER={name} needs the package {package}; run: pip install --requirement requirements-index.txt\n"
    )


def test_wrong_provider_setting_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        open_provider(load_index_settings(None, provider="openai"), None)
