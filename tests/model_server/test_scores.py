"""The reply style ``score``: labels by their probabilities, with llama.cpp itself and with a server that is odd on purpose."""

from __future__ import annotations

import asyncio
import json
import math
import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import async_llm_wrapper
import llm_wrapper
from aggregator import aggregate_conversation
from benchmarks.documents import conversations
from classifier import Classifier
from config import Settings, load_settings, load_taxonomy
from config.taxonomy import Taxonomy
from domain.conversation import Message, Outcome
from error_handler import LLMContextError, LLMError, LLMFormError, LLMUnavailableError
from model_server.models import chat_target
from model_server.protocol import ChatReply, ChatTarget, ServerRequest
from model_server.scores import LabelTokens, score_flow, slots_flow
from tests.fakes.tiny_engine import TinyEngine
from worker.reply_choice import classifier_for

# Labels that begin alike, one that is the beginning of another, and signs that JSON escapes.
FILE = """
intents: {Account: a, Account Access: b, Account Billing: c, Refund Request: d, Refund Status: e, 'Say "no"': f, Other: g}
topics: {Übergröße: a, Über: b, Money: c, Other: d}
sentiments: [Positive, Neutral, Negative, Negative Again]
categorization: false
"""
MESSAGES: list[Message] = [{"role": "system", "content": "Label it."}, {"role": "user", "content": "where is it?"}]
TARGET = ChatTarget(
    "openai_chat",
    "http://m:1/v1/chat/completions",
    "http://m:1",
    "m",
    None,
    8192,
    "10m",
    logprobs=True,
    engine="llamacpp",
)


@pytest.fixture(scope="module")
def taxonomy(tmp_path_factory: pytest.TempPathFactory) -> Taxonomy:
    path = tmp_path_factory.mktemp("taxonomy") / "taxonomy.yaml"
    path.write_text(FILE, encoding="utf-8")
    return load_taxonomy(path)


def settings_for(engine: TinyEngine) -> Settings:
    with urllib.request.urlopen(f"{engine.url}/v1/models", timeout=20) as response:
        [model] = json.load(response)["data"]
    return load_settings(
        None, llm_api_url=f"{engine.url}/v1/chat/completions", llm_model=model["id"], llm_timeout_s=300
    )


Calls = list[tuple[str, dict[str, Any], dict[str, Any]]]  # path, body, answer


def classify_sync(engine: TinyEngine, classifier: Classifier, count: int, calls: Calls) -> list[Outcome]:
    class Client(llm_wrapper.LLMClient):
        def send(self, request: ServerRequest) -> tuple[int, bytes]:
            status, body = super().send(request)
            calls.append((request.url.removeprefix(engine.url), json.loads(request.body or b"{}"), json.loads(body)))
            return status, body

    settings = settings_for(engine)
    with llm_wrapper.open_session() as session:
        client = Client(settings, replace(chat_target(settings, settings.model or ""), logprobs=True), session)
        client.prepare(settings)
        return [
            llm_wrapper.ollama_classify(aggregate_conversation(document), client, classifier)
            for document in conversations(count)
        ]


def classify_async(engine: TinyEngine, classifier: Classifier, count: int, calls: Calls) -> list[Outcome]:
    class Client(async_llm_wrapper.AsyncLLMClient):
        async def send(self, request: ServerRequest) -> tuple[int, bytes]:
            status, body = await super().send(request)
            calls.append((request.url.removeprefix(engine.url), json.loads(request.body or b"{}"), json.loads(body)))
            return status, body

    async def run() -> list[Outcome]:
        settings = settings_for(engine)
        async with async_llm_wrapper.open_session(count) as session:
            client = Client(settings, replace(chat_target(settings, settings.model or ""), logprobs=True), session)
            await client.prepare(settings)
            try:
                asked = [
                    async_llm_wrapper.ollama_classify_async(aggregate_conversation(document), client, classifier)
                    for document in conversations(count)
                ]
                return [await one for one in asked] if count == 1 else list(await asyncio.gather(*asked))
            finally:
                await client.breaker.close()

    return asyncio.run(run())


Classify = Callable[[TinyEngine, Classifier, int, Calls], list[Outcome]]
BOTH = pytest.mark.parametrize("classify", [classify_sync, classify_async], ids=["sync", "async"])


def post(engine: TinyEngine, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(engine.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def true_probabilities(
    engine: TinyEngine, before: list[Any], forms: Mapping[str, list[int]], most: int
) -> dict[str, float]:
    """Return the probability of each label of *forms* after *before*, by the unbiased ones of the whole vocabulary.

    Each way through the tree is followed to its end. Nothing of the product.
    """
    if len(forms) == 1:
        return dict.fromkeys(forms, 1.0)
    body = {"prompt": before, "n_predict": 1, "n_probs": most, "temperature": 0}
    [place] = post(engine, "/completion", body)["completion_probabilities"]
    weights = {entry["id"]: math.exp(entry["logprob"]) for entry in place["top_logprobs"]}
    following = {form[0] for form in forms.values()}
    total = sum(weights[number] for number in following)
    found: dict[str, float] = {}
    for number in following:
        rest = {name: form[1:] for name, form in forms.items() if form[0] == number}
        shares = true_probabilities(engine, [*before, number], rest, most)
        found |= {name: weights[number] / total * share for name, share in shares.items()}
    return found


@BOTH
def test_labels_and_confidence_are_those_of_the_engines_probabilities(
    engine: TinyEngine, taxonomy: Taxonomy, classify: Classify
) -> None:
    require_true_probabilities(engine, taxonomy, classify, 2000, 2e-3)


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_labels_and_confidence_are_those_of_a_trained_model(trained: TinyEngine, taxonomy: Taxonomy) -> None:
    """With weights of four bits, a token has other probabilities alone than in a batch, by some hundredths."""
    require_true_probabilities(trained, taxonomy, classify_sync, 60_000, 0.1)


def require_true_probabilities(
    engine: TinyEngine, taxonomy: Taxonomy, classify: Classify, most: int, within: float
) -> None:
    """Judge by the *most* unbiased probabilities, of the whole vocabulary, and by the tokens of the answer as a whole."""
    calls: Calls = []
    [outcome] = classify(engine, Classifier(taxonomy, "fit", "score"), 1, calls)
    assert outcome.confidence is not None
    [prompt] = [answer["prompt"] for path, _, answer in calls if path == "/apply-template"]
    labels = list(outcome.classification.labels.items())
    answer = '["'
    for place, (name, label) in enumerate(labels):
        end = '"]' if place == len(labels) - 1 else '","'
        forms = {}
        for other in taxonomy.names(name):
            text = answer + json.dumps(other, ensure_ascii=False)[1:-1] + end
            forms[other] = post(engine, "/tokenize", {"content": text})["tokens"]
        truth = true_probabilities(engine, [prompt], forms, most)
        assert sum(truth.values()) == pytest.approx(1)
        assert truth[label] >= max(truth.values()) - within
        assert outcome.confidence[name] == pytest.approx(truth[label], abs=within)
        answer += json.dumps(label, ensure_ascii=False)[1:-1] + end
    assert answer == json.dumps([label for _, label in labels], ensure_ascii=False, separators=(",", ":"))


@BOTH
def test_a_label_costs_few_tokens_and_the_prompt_is_read_once(
    engine: TinyEngine, taxonomy: Taxonomy, classify: Classify
) -> None:
    calls: Calls = []
    [outcome] = classify(engine, Classifier(taxonomy, "fit", "score"), 1, calls)
    [written] = classify(engine, Classifier(taxonomy, "fit", "list"), 1, [])
    first, *further = [answer for path, _, answer in calls if path == "/completion"]
    assert outcome.attempts == 1
    assert outcome.reply_tokens == 1 + len(further) < (written.reply_tokens or 0)
    assert outcome.prompt_tokens == written.prompt_tokens == first["tokens_evaluated"] - 2  # [ and "
    assert outcome.fingerprint != written.fingerprint
    assert all(answer["timings"]["prompt_n"] <= 20 for answer in further)
    assert [path for path, _, _ in calls].count("/tokenize") == len(taxonomy.fields)


@pytest.mark.slow
def test_each_conversation_keeps_a_slot_until_its_last_label(tiny_model: Path, taxonomy: Taxonomy) -> None:
    """More conversations at once than slots: none takes the cache from another, and the labels are those of a lone one."""
    classifier, calls = Classifier(taxonomy, "fit", "score"), Calls()
    with TinyEngine(tiny_model, slots=2) as engine:
        alone = classify_sync(engine, classifier, 6, [])
        together = classify_async(engine, classifier, 6, calls)
    assert [one.classification for one in alone] == [one.classification for one in together]
    answers = [answer for path, _, answer in calls if path == "/completion"]
    assert {answer["id_slot"] for answer in answers} == {0, 1}
    assert sum(answer["timings"]["prompt_n"] > 20 for answer in answers) <= 6, "each is read once"


# A server without HTTP


@dataclass
class Client:
    """What ``score_flow`` needs of a client."""

    target: ChatTarget = TARGET
    label_tokens: dict[bytes, LabelTokens] = field(default_factory=dict)


@dataclass
class Llama:
    """Answers as llama.cpp does. A token is a word, a space and a word, or signs.

    *weights*: the end of the text before -> token -> its weight, 1 if it is not there. *faults*: path -> status and body.
    With a seed below *unread*, it draws a part of a character.
    """

    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    faults: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    vocabulary: list[str] = field(default_factory=list)
    unread: int = 0
    pattern: str = r" ?[^\W_]+|[^\w]+?(?= ?\w|$)|."
    calls: list[str] = field(default_factory=list)

    def __call__(self, request: ServerRequest) -> tuple[int, bytes]:
        path, body = request.url.removeprefix("http://m:1"), json.loads(request.body or b"{}")
        self.calls.append(path)
        if path in self.faults:
            return self.faults[path]
        return 200, json.dumps(getattr(self, path[1:].replace("-", "_"))(body)).encode()

    def apply_template(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "".join(f"<{one['role']}>{one['content']}" for one in body["messages"]) + "<answer>"}

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        pieces = re.findall(self.pattern, body["content"])
        self.vocabulary += [piece for piece in dict.fromkeys(pieces) if piece not in self.vocabulary]
        return {"tokens": [{"id": self.vocabulary.index(piece), "piece": piece} for piece in pieces]}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        text = "".join(one if isinstance(one, str) else self.vocabulary[one] for one in body["prompt"])
        known = next((weights for end, weights in self.weights.items() if text.endswith(end)), {})
        allowed = {number: known.get(self.vocabulary[number], 1.0) for number, _ in body["logit_bias"]}
        probs = [
            {
                "id": number,
                "token": "",
                "bytes": list(self.vocabulary[number].encode()),
                "prob": one / sum(allowed.values()),
            }
            for number, one in allowed.items()
        ]
        places = [] if body["seed"] < self.unread else [{"top_probs": probs}]
        return {"completion_probabilities": places, "tokens_evaluated": 98 + len(body["prompt"])}


def test_slots_of_the_server_are_counted() -> None:
    flow = slots_flow(Client(), 5.0)
    assert next(flow).url == "http://m:1/props"
    with pytest.raises(StopIteration) as ended:
        flow.send((200, b'{"total_slots": 4}'))
    assert ended.value.value == 4
    flow = slots_flow(client := Client(), 5.0)
    next(flow)
    with pytest.raises(LLMFormError, match="slots"):
        flow.send((200, b"{}"))
    assert "scores" in client.target.refused


def ask(client: Client, llama: Llama, taxonomy: Taxonomy) -> ChatReply:
    schema = Classifier(taxonomy, "fit", "score").schema_json
    flow = score_flow(client, MESSAGES, schema, 5.0)
    try:
        request = next(flow)
        while True:
            request = flow.send(llama(request))
    except StopIteration as finished:
        return finished.value  # type: ignore[no-any-return]


def test_most_probable_label_wins_over_the_most_probable_first_token(taxonomy: Taxonomy) -> None:
    """Three labels share 0.6, so none of them has as much as the one with 0.3."""
    llama = Llama({'<answer>["': {"Account": 6, "Refund": 0.5, "Say": 0.5, "Other": 3}})
    reply = ask(Client(), llama, taxonomy)
    assert json.loads(reply.text)[0] == "Other"
    assert reply.scores[0] == 0.3
    assert reply.prompt_tokens == 99
    assert llama.calls.count("/completion") == reply.reply_tokens == 5  # Account and Negative are taken apart


def test_part_of_a_character_is_drawn_again(taxonomy: Taxonomy) -> None:
    """The answer has no probabilities then; after five of them the server counts as one that has none."""
    likely = {'<answer>["': {"Other": 3}}
    assert json.loads(ask(Client(), Llama(likely, unread=4), taxonomy).text)[0] == "Other"
    with pytest.raises(LLMFormError, match="no probabilities"):
        ask(Client(), Llama(likely, unread=5), taxonomy)


def test_label_that_begins_another_one_ends_with_the_quote(taxonomy: Taxonomy) -> None:
    llama = Llama(
        {
            '<answer>["': {"Account": 80},
            "Account": {" Access": 8},
            ',"Money","': {"Negative": 80},
            "Negative": {'"]': 9},
        }
    )
    reply = ask(Client(), llama, taxonomy)
    assert json.loads(reply.text)[0] == "Account Access"
    llama.weights["Account"] = {'","': 8}
    assert json.loads(ask(Client(), llama, taxonomy).text)[0] == "Account"


def test_tokens_of_labels_are_read_once_for_a_client(taxonomy: Taxonomy) -> None:
    client, llama = Client(), Llama()
    ask(client, llama, taxonomy)
    ask(client, llama, taxonomy)
    assert llama.calls.count("/tokenize") == 3


def test_no_confidence_without_log_probabilities(taxonomy: Taxonomy) -> None:
    assert ask(Client(replace(TARGET, logprobs=False)), Llama(), taxonomy).scores == ()


def test_another_model_at_the_same_address_is_noticed(taxonomy: Taxonomy) -> None:
    """The numbers of its tokens mean other texts. The next attempt reads them again."""
    client, llama = Client(), Llama()
    ask(client, llama, taxonomy)
    llama.vocabulary.reverse()
    with pytest.raises(LLMUnavailableError, match="another model"):
        ask(client, llama, taxonomy)
    assert ask(client, llama, taxonomy).text


def test_model_without_system_role_gets_the_rules_in_the_first_turn(taxonomy: Taxonomy) -> None:
    client, llama = Client(), Llama()

    def apply_template(body: dict[str, Any]) -> dict[str, Any]:
        assert body["messages"][0]["role"] == "user"
        return {"prompt": "<answer>"}

    refusal = 500, b'{"error": {"message": "System role not supported"}}'
    flow = score_flow(client, MESSAGES, Classifier(taxonomy, "fit", "score").schema_json, 5.0)
    llama.apply_template = apply_template  # type: ignore[method-assign]
    next(flow)
    status, body = llama(flow.send(refusal))
    assert status == 200, body
    assert client.target.merges_system


NO_PROBS = b'{"completion_probabilities": [{"top_logprobs": []}]}'
UNBIASED = b'{"completion_probabilities": [{"top_probs": [{"id": 9999, "bytes": [65], "prob": 1.0}]}]}'


@pytest.mark.parametrize(
    ("faults", "pattern"),
    [
        ({"/apply-template": (404, b"{}")}, None),
        ({"/apply-template": (200, b"{}")}, None),
        ({"/tokenize": (501, b"{}")}, None),
        ({"/completion": (404, b"{}")}, None),
        ({"/completion": (200, NO_PROBS)}, None),
        ({"/completion": (200, UNBIASED)}, None),
        ({"/tokenize": (200, b'{"tokens": [1, 2]}')}, None),
        ({}, r'"?\w+|.'),  # a label does not begin with a token of its own
    ],
)
def test_server_that_does_not_offer_it_is_learned_once(
    taxonomy: Taxonomy, caplog: pytest.LogCaptureFixture, faults: dict[str, tuple[int, bytes]], pattern: str | None
) -> None:
    client = Client()
    llama = Llama(faults=faults, **({"pattern": pattern} if pattern else {}))
    for _ in range(2):
        with pytest.raises(LLMFormError):
            ask(client, llama, taxonomy)
    assert "scores" in client.target.refused
    assert len([record for record in caplog.records if "REPLY_STYLE=list" in record.message]) == 1
    assert Classifier(taxonomy, "fit", "score").for_target(client.target).reply_style == "list"


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (
            400,
            b'{"error": {"message": "too long", "type": "exceed_context_size_error"}}',
            LLMContextError,
        ),
        (503, b'{"error": {"message": "Loading model"}}', LLMUnavailableError),
        (200, b"not JSON", LLMUnavailableError),
    ],
)
def test_other_refusals_are_those_of_a_chat(taxonomy: Taxonomy, status: int, body: bytes, kind: type[LLMError]) -> None:
    client = Client()
    with pytest.raises(kind):
        ask(client, Llama(faults={"/completion": (status, body)}), taxonomy)
    assert not client.target.refused


def test_server_of_another_kind_and_a_field_with_several_labels_get_the_list(
    taxonomy: Taxonomy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_settings(None, llm_api_url="http://m:1/v1/chat/completions", llm_model="m", reply_style="score")
    path = tmp_path / "taxonomy.yaml"
    path.write_text(FILE + "fields: {channels: {labels: [Phone, Mail], multiple: true}}\n", encoding="utf-8")
    multiple = load_taxonomy(path)
    other = replace(TARGET, engine="")
    assert classifier_for(settings, TARGET, taxonomy).reply_style == "score"
    assert classifier_for(settings, replace(TARGET, engine="vllm"), taxonomy).reply_style == "score"
    assert not caplog.records
    assert classifier_for(settings, TARGET, multiple).reply_style == "list"
    assert classifier_for(settings, other, taxonomy).reply_style == "list"
    assert all("the reply style is list and not score" in record.message for record in caplog.records)
    assert len(caplog.records) == 2
    with pytest.raises(LLMFormError, match="several labels"):
        ask(Client(), Llama(), multiple)
    with pytest.raises(LLMFormError, match="own server"):
        ask(Client(other), Llama(), taxonomy)
