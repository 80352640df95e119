"""A run in the reply style ``score`` with llama.cpp: what is stored, and what the next run thinks of it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.worker.site import Site, filled

TAXONOMY = """
intents: {Status: where it is, Refund: money back, Other: else}
topics: {Parcel: delivery, Parcel Insurance: claims, Other: else}
sentiments: [Positive, Neutral, Negative]
"""


def test_run_stores_labels_with_confidence_and_knows_them_again(site: Site, engine: TinyEngine, tmp_path: Path) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text(TAXONOMY, encoding="utf-8")
    site.model = None
    site.settings |= {
        "LLM_API_URL": f"{engine.url}/v1/chat/completions",
        "LLM_MODEL": MODEL_NAME,
        "TAXONOMY_FILE": str(path),
        "REPLY_STYLE": "score",
        "MAX_CONCURRENT": "2",
    }
    filled(site, 4)
    ended = site.run()
    assert ended.code == 0, ended.err
    assert "score" not in ended.err, "no warning"
    results = list(site.results.find())
    assert len(results) == 4
    for result in results:
        assert list(result["classification"]) == ["intent", "topic", "sentiment"]
        metadata = result["processing_metadata"]
        assert all(0 < value <= 1 for value in metadata["confidence"].values())
        assert metadata["confidence"].keys() == set(result["classification"])
        assert metadata["reply_tokens"] <= 9
    assert re.search(r"^done +4 ", site.run("plan").out, re.MULTILINE)
    assert re.search(r"^style +4 ", site.run("plan", REPLY_STYLE="list").out, re.MULTILINE)
    checked = site.run("doctor")
    assert "The test conversation got valid labels" in checked.out, checked.out
