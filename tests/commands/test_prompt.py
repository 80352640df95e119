"""``cli.py prompt suggest`` with a model that follows its examples: choice, gain, masking, and the file."""

from __future__ import annotations

import json
import stat
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from config import load_prompt_taxonomy, load_settings, load_taxonomy
from config.examples import load_examples
from error_handler import ConfigurationError
from prompt_builder import build_system_prompt
from tests.fakes.scripted_server import Handler, ScriptedServer, answer, chat_reply
from tests.in_process import run_cli
from tests.review.review_site import AGREED
from tests.worker.site import Site, conversation, open_site

FOLLOWS = '"intent": "Order Status", "topic": "Banking/Cards"'  # of an example for the odd conversations below
SECRETS = ("anna@example.com", "+1 212 555 0147", "4111 1111 1111 1111")
ODD = "where is my new card? it was sent weeks ago. " + ", ".join(SECRETS)


class Model:
    """Says AGREED, and what the example says about a card if the prompt has one and *follows* is set."""

    def __init__(self, *, follows: bool) -> None:
        self.follows = follows
        self.calls = 0

    def __call__(self, handler: Handler) -> None:
        request = handler.server_state.requests[-1]
        if not request.path.endswith("/chat") or not request.json.get("messages"):
            answer()(handler)
            return
        self.calls += 1
        system, user = (message["content"] for message in request.json["messages"])
        labels = {"categorization": "A customer waits.", **AGREED}
        if self.follows and FOLLOWS in system and "card" in user:
            labels |= {"intent": "Order Status", "topic": "Banking/Cards"}
        answer(chat_reply(json.dumps(labels)))(handler)


@pytest.fixture
def place(mongodb_uri: str, db_name: str, tmp_path: Path, server: ScriptedServer) -> Iterator[Site]:
    """Eighteen reviewed conversations: each third one is about a card, and was corrected."""
    with open_site(mongodb_uri, db_name, None, tmp_path) as opened:
        opened.settings |= {"OLLAMA_ENDPOINT": server.url}
        for number in range(18):
            text = ODD if number % 3 == 0 else "my parcel is late and nobody answers"
            opened.source.insert_one(conversation(number, text))
            right = {**AGREED, "intent": "Order Status", "topic": "Banking/Cards"} if number % 3 == 0 else AGREED
            opened.database["sentimental_analysis_corrections"].insert_many(
                {
                    "source_conversation_id": number,
                    "field": field,
                    "from": AGREED[field],
                    "to": label,
                    "reviewer": "anna",
                    "at": datetime.now(UTC),
                    "source": "confidence",
                }
                for field, label in right.items()
            )
        yield opened


def suggest(place: Site, server: ScriptedServer, model: Model, *flags: str, **settings: str) -> tuple[int, str, str]:
    server.script = deque([model] * 2000)
    command = ["prompt", "suggest", "--max-concurrent", "1", *flags]
    return run_cli(command, place.environment(**settings), place.folder)


def test_examples_that_help_are_measured_on_the_other_half_and_written(place: Site, server: ScriptedServer) -> None:
    """The number of calls is announced and kept; personal data is masked; the file makes the prompt use the examples."""
    file, model = place.folder / "examples.json", Model(follows=True)
    code, out, err = suggest(place, server, model, "--write", str(file))
    assert code == 0, err
    most = int(err.split("At most ")[1].split(" ")[0].replace(",", ""))
    assert 0 < model.calls <= most
    assert "1 example (at most 8):" in out
    (line,) = (line for line in out.splitlines() if line.startswith("Other half"))
    assert "0 wrong" in line
    assert "Change: +" in line
    (example,) = load_examples(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not [secret for secret in SECRETS if secret in file.read_text()]
    assert all(kind in example.transcript for kind in ("<EMAIL_", "<PHONE_", "<CARD_"))
    assert example.answer == {
        "categorization": "A customer waits.",
        "intent": "Order Status",
        "topic": "Banking/Cards",
        "sentiment": "Negative",
    }
    settings = load_settings(None, prompt_examples_file=file)
    assert FOLLOWS in build_system_prompt(load_prompt_taxonomy(settings))
    assert FOLLOWS not in build_system_prompt(load_taxonomy())
    # The examples of the prompt are no gold for it, and stay when others are added.
    code, out, err = suggest(place, server, model, PROMPT_EXAMPLES_FILE=str(file))
    assert code == 0
    assert "17 reviewed conversations" in err
    assert "No example helps" in out
    # Nor is a copy of one, whose personal data the file does not have.
    source = json.loads(file.read_text())["examples"][0]["source"]
    file.write_text(file.read_text().replace(json.dumps(source), '"another"'))
    code, _, err = suggest(place, server, model, PROMPT_EXAMPLES_FILE=str(file))
    assert code == 0
    assert "17 reviewed conversations" in err


def test_examples_without_a_gain_are_not_written(place: Site, server: ScriptedServer) -> None:
    file = place.folder / "examples.json"
    code, out, _ = suggest(place, server, Model(follows=False), "--write", str(file))
    assert code == 1
    assert "No example helps" in out
    assert "was not written" in out
    assert not file.exists()


def test_limit_bounds_the_calls(place: Site, server: ScriptedServer) -> None:
    """And nothing is written without --write."""
    model = Model(follows=True)
    code, out, err = suggest(place, server, model, "--limit", "12")
    assert code == 0
    assert "12 reviewed conversations" in err
    assert "Nothing was changed" in out
    assert model.calls <= 12 * 13


def test_unusable_answers_count_as_wrong(place: Site, server: ScriptedServer) -> None:
    server.script = deque([answer(chat_reply("no JSON"))] * 3000)
    code, out, _ = run_cli(["prompt", "suggest", "--limit", "10"], place.environment(), place.folder)
    assert code == 0
    assert "No example helps" in out


@pytest.mark.parametrize(("lost", "code"), [(1, 0), (4, 3)])
def test_lost_call_does_not_lose_the_measurement(place: Site, server: ScriptedServer, lost: int, code: int) -> None:
    """It counts as a wrong answer; many say that the server is not well."""
    model, left = Model(follows=True), [lost]

    def first_busy(handler: Handler) -> None:
        is_question = bool(handler.server_state.requests[-1].json.get("messages"))
        if is_question and left[0]:
            left[0] -= 1
            answer({"error": "busy"}, 503)(handler)
        else:
            model(handler)

    server.script = deque([first_busy] * 2000)
    command = ["prompt", "suggest", "--max-concurrent", "1"]
    ended, out, err = run_cli(command, place.environment(LLM_MAX_ATTEMPTS="1"), place.folder)
    assert ended == code, err
    assert ("Change: +" in out) is not code


def test_refused_key_is_an_error_and_not_a_wrong_answer(place: Site, server: ScriptedServer) -> None:
    """Of a server that lists its models without a key; the sentence would be that no example helps."""

    def refuse(handler: Handler) -> None:
        request = handler.server_state.requests[-1]
        is_question = request.path.endswith("/chat") and request.json.get("messages")
        (answer({"error": "unauthorized"}, 401) if is_question else answer())(handler)

    server.script = deque([refuse] * 200)
    code, out, err = run_cli(["prompt", "suggest"], place.environment(), place.folder)
    assert code == 3
    assert "requires a key" in err
    assert "No example helps" not in out


def test_suggestion_needs_corrections(place: Site, server: ScriptedServer) -> None:
    """Not decisions that the taxonomy does not know any more: no example can have them."""
    corrections = place.database["sentimental_analysis_corrections"]
    corrections.delete_many({"field": "topic"})
    corrections.update_many({"to": "Order Status"}, {"$set": {"to": "Gone"}})
    code, _, err = suggest(place, server, Model(follows=True))
    assert code == 2
    assert "Review more: python cli.py review" in err


@pytest.mark.parametrize("content", ["", "[]", '{"examples": [{"transcript": 1}]}', '{"examples": 3}'])
def test_wrong_examples_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "examples.json"
    with pytest.raises(ConfigurationError, match="PROMPT_EXAMPLES_FILE"):
        load_examples(file)
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="prompt suggest --write"):
        load_examples(file)


def test_example_with_a_label_outside_the_taxonomy_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "examples.json"
    entry: dict[str, Any] = {"transcript": "Customer: hello", "source": "1", "answer": {**AGREED, "intent": "Gone"}}
    file.write_text(json.dumps({"examples": [entry]}))
    settings = load_settings(None, prompt_examples_file=file)
    assert build_system_prompt(load_prompt_taxonomy(settings)) == build_system_prompt(load_taxonomy())
