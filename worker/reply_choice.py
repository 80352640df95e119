"""The reply style of a run: that of the setting or, for ``auto``, the one that was measured and stored.

``evaluation.style_choice`` measures. The choice is in the state directory, by the plan of the style ``full``. So it holds
until the model, the prompt or the taxonomy changes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orjson

from classifier import Classifier
from config import Settings, Taxonomy, load_prompt_taxonomy
from domain.reply_style import LONGER, STYLES, ReplyStyle
from model_server.protocol import ChatTarget
from model_server.scores import takes_scores
from storage.files import replace_file

logger = logging.getLogger(__name__)

FILE = "reply_style.json"
MOST_KEPT = 20  # choices in the file, of as many models and prompts


def classifier_for(settings: Settings, target: ChatTarget, taxonomy: Taxonomy | None = None) -> Classifier:
    """Return the classifier of a run with *settings* and *target*, whose model was found on the server.

    *taxonomy* None reads the one that *settings* name, with its examples.
    """
    taxonomy = taxonomy or load_prompt_taxonomy(settings)
    style = style_of(settings, target, taxonomy)
    if settings.reply_style == "score" != style:
        logger.warning(
            "the reply style is %s and not score, which needs llama.cpp's own server or vLLM, and fields with one label each",
            style,
        )
    return Classifier(taxonomy, settings.on_long, style)


def style_of(settings: Settings, target: ChatTarget, taxonomy: Taxonomy) -> ReplyStyle:
    """Return the reply style of a run: ``auto`` is ``full`` if no choice is stored, and ``score`` is ``list`` if it cannot be used."""
    style = settings.reply_style
    if style == "auto":
        style = stored_choice(settings.batch_files_dir, Classifier(taxonomy).plan(target)) or "full"
    return LONGER[style] if style == "score" and not can_score(target, taxonomy) else style


def can_score(target: ChatTarget, taxonomy: Taxonomy) -> bool:
    """Return whether the style ``score`` works with the server of *target*, as far as is known, and with *taxonomy*."""
    return takes_scores(target) and not any(field.is_multiple for field in taxonomy.fields)


def stored_choice(directory: Path, plan: str) -> ReplyStyle | None:
    """Return the style that was chosen for *plan*, the plan of the style ``full``; None if there is none."""
    entry = _read(directory).get(plan)
    style = entry.get("style") if isinstance(entry, dict) else None
    return style if style in STYLES else None


def store_choice(directory: Path, plan: str, choice: dict[str, Any]) -> None:
    """Store *choice* for *plan*: its ``style``, and what was found."""
    kept = {name: entry for name, entry in _read(directory).items() if name != plan}
    latest = dict([*kept.items(), (plan, choice)][-MOST_KEPT:])
    replace_file(directory / FILE, orjson.dumps(latest, option=orjson.OPT_INDENT_2))


def _read(directory: Path) -> dict[str, Any]:
    try:
        content = orjson.loads((directory / FILE).read_bytes())
    except (OSError, ValueError):  # missing or damaged: it is measured again
        return {}
    return content if isinstance(content, dict) else {}
