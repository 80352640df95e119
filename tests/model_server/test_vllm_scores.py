"""The reply style ``score`` with vLLM, through HTTP and both wrappers, with a server made from vLLM's source.

No vLLM ever ran these requests; see tests.fakes.fake_vllm for what it is made of. One test puts llama.cpp behind it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import async_llm_wrapper
import llm_wrapper
from aggregator import aggregate_conversation
from classifier import Classifier
from config import load_settings, load_taxonomy
from config.taxonomy import Taxonomy
from domain.conversation import Outcome
from error_handler import LLMContextError, LLMError
from model_server.models import chat_target
from model_server.vllm import MOST_IDS
from tests.fakes.fake_vllm import MODEL, Vllm, byte_level, fake_vllm, sentence_piece
from tests.fakes.scripted_server import Handler, ScriptedServer, Step, answer, reset
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.model_server.test_scores import post

# Labels that begin alike, one that is the beginning of another, and signs that JSON escapes.
FILE = """
intents: {Account: a, Account Access: b, Account Billing: c, Refund Request: d, Refund Status: e, 'Say "no"': f, Other: g}
topics: {Übergröße: a, Über: b, Money: c, Other: d}
sentiments: [Positive, Neutral, Negative, Negative Again]
categorization: false
"""
# Nine tenths of Account is the label that ends there; three labels that begin alike share 0.6 of the first token.
WEIGHTS = {
    '<assistant>["': {"Account": 6, "Refund": 0.5, "Say": 0.5, "Other": 3},
    '["Account': {'","': 9, " Access": 0.5, " Billing": 0.5},
    '["Account","': {"\xc3": 80, "Money": 10, "Other": 10},
    '["Account","Ü': {"ber": 1, "bergr": 3},
    'Übergröße","': {"Positive": 1, "Neutral": 1, "Negative": 2},
    "Negative": {'"]': 1, " Again": 3},
}


@pytest.fixture(scope="module")
def taxonomy(tmp_path_factory: pytest.TempPathFactory) -> Taxonomy:
    path = tmp_path_factory.mktemp("taxonomy") / "taxonomy.yaml"
    path.write_text(FILE, encoding="utf-8")
    return load_taxonomy(path)


@dataclass
class Ran:
    """The outcomes, or the error that ended the run; and the abilities of the server that the client learned to do without."""

    outcomes: list[Outcome]
    error: LLMError | None
    refused: frozenset[str]


def documents(count: int) -> list[dict[str, Any]]:
    return [{"text": f"where is parcel {'x' * number}?"} for number in range(1, count + 1)]


def classify_sync(
    server: ScriptedServer | TinyEngine, classifier: Classifier, count: int = 1, model: str = MODEL
) -> Ran:
    settings = load_settings(None, llm_api_url=f"{server.url}/v1/chat/completions", llm_model=model, llm_backoff_s=0.01)
    with llm_wrapper.open_session() as session:
        client = llm_wrapper.LLMClient(settings, replace(chat_target(settings, model), logprobs=True), session)
        client.prepare(settings)
        outcomes: list[Outcome] = []
        try:
            for one in documents(count):
                outcomes.append(llm_wrapper.ollama_classify(aggregate_conversation(one), client, classifier))
        except LLMError as error:
            return Ran(outcomes, error, client.target.refused)
        return Ran(outcomes, None, client.target.refused)


def classify_async(server: ScriptedServer, classifier: Classifier, count: int = 1, *, at_once: bool = False) -> Ran:
    async def run() -> Ran:
        settings = load_settings(
            None, llm_api_url=f"{server.url}/v1/chat/completions", llm_model=MODEL, llm_backoff_s=0.01
        )
        async with async_llm_wrapper.open_session(count) as session:
            target = replace(chat_target(settings, MODEL), logprobs=True)
            client = async_llm_wrapper.AsyncLLMClient(settings, target, session)
            await client.prepare(settings)
            asked = (
                async_llm_wrapper.ollama_classify_async(aggregate_conversation(one), client, classifier)
                for one in documents(count)
            )
            outcomes: list[Outcome] = []
            try:
                if at_once:
                    outcomes += await asyncio.gather(*asked)
                else:
                    for one in asked:
                        outcomes.append(await one)
            except LLMError as error:
                return Ran(outcomes, error, client.target.refused)
            finally:
                await client.breaker.close()
            return Ran(outcomes, None, client.target.refused)

    return asyncio.run(run())


class LlamaCppBehind(Vllm):
    """vLLM's routes, with template, tokenizer and probabilities of *engine*, whose vocabulary is *names*."""

    engine: TinyEngine
    names: list[str]

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["prompt"] if "prompt" in body else post(self.engine, "/apply-template", body)["prompt"]
        asked = {"content": text, "add_special": False, "parse_special": "messages" in body}
        found = post(self.engine, "/tokenize", asked)["tokens"]
        return {"tokens": found, "token_strs": [self.names[number] for number in found]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = {"prompt": body["prompt"], "n_predict": 1, "n_probs": len(self.names), "temperature": 0}
        [found] = post(self.engine, "/completion", asked)["completion_probabilities"]
        all_of_them = {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}
        place = {f"token_id:{number}": all_of_them[number] for number in [found["id"], *body["logprob_token_ids"]]}
        return {"choices": [{"logprobs": {"top_logprobs": [place]}, "finish_reason": "length"}]}


def test_labels_are_those_of_llama_cpp_with_the_same_model(
    engine: TinyEngine, tiny_model: Path, taxonomy: Taxonomy
) -> None:
    """Another tokenizer and other probabilities than the fake's, and other requests than those for llama.cpp."""
    import gguf

    classifier, vllm = Classifier(taxonomy, "fit", "score"), LlamaCppBehind()
    vllm.engine = engine
    vllm.names = gguf.GGUFReader(tiny_model).fields["tokenizer.ggml.tokens"].contents()
    with fake_vllm(vllm) as server:
        [through] = classify_sync(server, classifier).outcomes
        assert readings(server)
    [itself] = classify_sync(engine, classifier, model=MODEL_NAME).outcomes
    assert through.classification == itself.classification
    assert through.confidence is not None
    assert through.confidence == pytest.approx(itself.confidence, abs=2e-3)
    assert (through.prompt_tokens, through.reply_tokens) == (itself.prompt_tokens, itself.reply_tokens)


Classify = Callable[[ScriptedServer, Classifier, int], Ran]
BOTH = pytest.mark.parametrize("classify", [classify_sync, classify_async], ids=["sync", "async"])


def paths(server: ScriptedServer) -> list[str]:
    """Return the kinds of POST requests, in order; that of messages is /prompt."""
    posts = [request for request in server.requests if request.method == "POST"]
    return [
        "/prompt" if "messages" in request.json and request.path == "/tokenize" else request.path for request in posts
    ]


def readings(server: ScriptedServer) -> list[dict[str, Any]]:
    return [request.json for request in server.requests if request.path == "/v1/completions"]


@BOTH
@pytest.mark.parametrize("spelling", [byte_level, sentence_piece])
def test_labels_and_confidence_are_those_of_the_servers_probabilities(
    taxonomy: Taxonomy, classify: Classify, spelling: Callable[[bytes], str]
) -> None:
    with fake_vllm(Vllm(WEIGHTS, spelling=spelling)) as server:
        ran = classify(server, Classifier(taxonomy, "fit", "score"), 1)
    [outcome] = ran.outcomes
    assert list(outcome.classification.labels.values()) == ["Account", "Übergröße", "Negative Again"]
    assert outcome.confidence is not None
    assert list(outcome.confidence.values()) == pytest.approx([0.6 * 0.9, 0.8 * 0.75, 0.5 * 0.75])
    assert outcome.reply_tokens == len(readings(server)) == 6
    assert outcome.prompt_tokens == len(readings(server)[0]["prompt"]) - 1  # ["
    assert not ran.refused


def test_most_probable_label_wins_over_the_most_probable_first_token(taxonomy: Taxonomy) -> None:
    """The three labels behind the likeliest token have a third of it each."""
    with fake_vllm(Vllm({'<assistant>["': {"Account": 6, "Refund": 0.5, "Say": 0.5, "Other": 3}})) as server:
        [outcome] = classify_sync(server, Classifier(taxonomy, "fit", "score")).outcomes
    assert outcome.classification.labels["intent"] == "Other"
    assert outcome.confidence is not None
    assert outcome.confidence["intent"] == 0.3


@BOTH
def test_nothing_is_asked_twice_and_each_reading_goes_on_from_the_one_before(
    taxonomy: Taxonomy, classify: Classify
) -> None:
    """So the server has all but a few tokens in its prefix cache."""
    with fake_vllm(Vllm(WEIGHTS)) as server:
        ran = classify(server, Classifier(taxonomy, "fit", "score"), 2)
    assert len(ran.outcomes) == 2
    one = ["/v1/completions"] * 6
    assert paths(server) == ["/prompt", *["/tokenize"] * 3, *one, "/prompt", *one]
    bodies = [(request.path, request.body) for request in server.requests if request.method == "POST"]
    assert len({*bodies}) == len(bodies)
    asked = readings(server)
    assert all(body["max_tokens"] == 1 and body["logprobs"] == 1 for body in asked)
    for conversation in (asked[:6], asked[6:]):
        prompts = [body["prompt"] for body in conversation]
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(prompts))
        assert len(prompts[-1]) - len(prompts[0]) < 20


def test_conversations_share_the_server_without_slots(taxonomy: Taxonomy) -> None:
    classifier = Classifier(taxonomy, "fit", "score")
    with fake_vllm(Vllm(WEIGHTS)) as server:
        alone = classify_sync(server, classifier, 8).outcomes
        together = classify_async(server, classifier, 8, at_once=True).outcomes
    assert [one.classification for one in alone] == [one.classification for one in together]
    assert "/props" not in {request.path for request in server.requests}


class WithoutTokenize(Vllm):
    """A proxy that passes only OpenAI's routes on."""

    def __call__(self, handler: Handler) -> None:
        if handler.path == "/tokenize":
            answer({"detail": "Not Found"}, 404)(handler)
        else:
            super().__call__(handler)


@BOTH
@pytest.mark.parametrize(
    ("vllm", "readings_made"),
    [
        (Vllm(ids="ignored"), 1),
        (Vllm(ids="refused"), 1),
        (Vllm(ids="texts only"), 1),
        (Vllm(spelling=lambda piece: "?"), 0),
        (WithoutTokenize(), 0),
    ],
    ids=["ignored", "refused", "texts only", "other vocabulary", "no tokenizer"],
)
def test_server_without_the_parameter_gets_the_list_from_then_on(
    taxonomy: Taxonomy, classify: Classify, vllm: Vllm, readings_made: int, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = replace(vllm, weights=WEIGHTS, vocabulary=[*vllm.vocabulary])
    with fake_vllm(vllm) as server:
        ran = classify(server, Classifier(taxonomy, "fit", "score"), 3)
    assert ran.error is None
    assert "scores" in ran.refused
    first = {field.name: field.names[0] for field in taxonomy.fields}
    assert [outcome.classification.labels for outcome in ran.outcomes] == [first] * 3, "those of the chat route"
    assert len(readings(server)) == readings_made
    assert paths(server)[-3:] == ["/v1/chat/completions"] * 3
    assert paths(server).count("/v1/chat/completions") == 3
    assert len([record for record in caplog.records if "REPLY_STYLE=list" in record.message]) == 1


def test_more_labels_than_the_server_takes_at_once_are_asked_in_parts(tmp_path: Path) -> None:
    """Its probabilities are those of the whole vocabulary, so parts can be compared."""
    names = ["".join(letters).title() for letters in itertools.product(string.ascii_lowercase, repeat=2)][:200]
    path = tmp_path / "labels.yaml"
    few = {"Money": "x", "Other": "x"}
    content = {"intents": dict.fromkeys([*names, "Other"], "x"), "topics": few, "sentiments": ["Positive", "Negative"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    weights = {'<assistant>["': {names[190]: 50.0, names[5]: 30.0}}
    with fake_vllm(Vllm(weights)) as server:
        ran = classify_sync(server, Classifier(load_taxonomy(path), "fit", "score"))
    [outcome] = ran.outcomes
    assert outcome.classification.labels["intent"] == names[190]
    assert outcome.confidence is not None
    assert outcome.confidence["intent"] == pytest.approx(50 / (50 + 30 + 199), abs=1e-4)
    first, second = readings(server)[:2]
    assert first["prompt"] == second["prompt"]
    assert [len(body["logprob_token_ids"]) for body in (first, second)] == [MOST_IDS, 201 - MOST_IDS]


@BOTH
def test_too_long_conversation_is_that_of_a_chat(taxonomy: Taxonomy, classify: Classify) -> None:
    with fake_vllm(Vllm(WEIGHTS, window=50)) as server:
        ran = classify(server, Classifier(taxonomy, "fit", "score"), 1)
    assert isinstance(ran.error, LLMContextError)
    assert ran.error.window_tokens == 50
    assert not ran.refused


class Stopping(Vllm):
    """Aborts its first call, as a stopping server aborts the calls in flight."""

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.finish, first = "length", self.finish
        found = super().complete(body)
        if first == "abort":
            found["choices"][0] |= {"finish_reason": "abort", "logprobs": {"tokens": [], "top_logprobs": []}}
        return found


@BOTH
def test_aborted_call_is_repeated_and_teaches_nothing(taxonomy: Taxonomy, classify: Classify) -> None:
    with fake_vllm(Stopping(WEIGHTS, finish="abort")) as server:
        ran = classify(server, Classifier(taxonomy, "fit", "score"), 1)
    [outcome] = ran.outcomes
    assert outcome.classification.labels["intent"] == "Account"
    assert not ran.refused
    assert len(readings(server)) == 1 + 6


@BOTH
@pytest.mark.parametrize("fault", [answer({"error": {"message": "overloaded", "code": 503}}, 503), reset, answer(b"{")])
def test_fault_on_the_way_is_repeated_and_teaches_nothing(taxonomy: Taxonomy, classify: Classify, fault: Step) -> None:
    with fake_vllm(Vllm(WEIGHTS)) as server:
        server.script.append(fault)
        ran = classify(server, Classifier(taxonomy, "fit", "score"), 1)
    assert ran.outcomes[0].classification.labels["intent"] == "Account"
    assert not ran.refused


def test_model_without_system_role_gets_the_rules_in_the_first_turn(taxonomy: Taxonomy) -> None:
    with fake_vllm(Vllm(WEIGHTS, has_system=False)) as server:
        ran = classify_sync(server, Classifier(taxonomy, "fit", "score"), 2)
    assert [outcome.classification.labels["intent"] for outcome in ran.outcomes] == ["Account"] * 2
    assert paths(server).count("/prompt") == 3, "refused once"


class Swapped(Vllm):
    """Another model from the third prompt on: the numbers of its tokens mean other texts."""

    prompts = 0

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        self.prompts += "messages" in body
        if self.prompts == 3 and "messages" in body:
            self.vocabulary[1:] = reversed(self.vocabulary[1:])
        return super().tokenize(body)


def test_another_model_at_the_same_address_is_noticed(taxonomy: Taxonomy) -> None:
    """The prompt's own tokens show it. The next attempt reads the labels' tokens again."""
    with fake_vllm(Swapped(WEIGHTS)) as server:
        ran = classify_sync(server, Classifier(taxonomy, "fit", "score"), 4)
    assert [outcome.classification.labels["intent"] for outcome in ran.outcomes] == ["Account"] * 4
    assert paths(server).count("/tokenize") == 6
    assert len(readings(server)) == 24, "none with the tokens of the other model"
