"""Reply styles: prompt, schema and parser of each, through both wrappers and both protocols."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import api
import async_llm_wrapper
import llm_wrapper
import main
from aggregator import aggregate_conversation
from classifier import Classifier, classification_schema
from config import Settings, load_settings, load_taxonomy
from config.taxonomy import Taxonomy
from domain.conversation import Outcome
from domain.reply_style import STYLES, ReplyStyle
from error_handler import LLMReplyError, Reason
from model_server.grammar import compact_grammar
from model_server.models import chat_target
from model_server.protocol import ChatReply
from prompt_builder import build_system_prompt
from tests.cases import mostly_thorough
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.scripted_server import answer, chat_reply, scripted_server
from tests.fakes.tiny_engine import MODEL_NAME, TinyEngine
from tests.service.service_process import serve

TAXONOMY = load_taxonomy()
FIELDS = """
intents: {Order Status: where it is, Other: else}
topics: {Shipping/Delivery: parcels, Other: else}
sentiments: [Positive, Neutral, Negative]
fields:
  channels: {labels: [Phone, Mail, Chat], multiple: true}
"""
LABELS = ["Order Status", "Shipping/Delivery", "Negative"]
CONVERSATION = aggregate_conversation({"text": "where is it?"})


def of_fields(tmp_path: Path) -> Taxonomy:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(FIELDS, encoding="utf-8")
    return load_taxonomy(path)


def classify_sync(
    settings: Settings, classifier: Classifier, times: int = 1, *, prepares: bool = False
) -> list[Outcome]:
    with llm_wrapper.open_session() as session:
        client = llm_wrapper.LLMClient(settings, chat_target(settings, settings.model or ""), session)
        if prepares:
            client.prepare(settings)
        return [llm_wrapper.ollama_classify(CONVERSATION, client, classifier) for _ in range(times)]


def classify_async(
    settings: Settings, classifier: Classifier, times: int = 1, *, prepares: bool = False
) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with async_llm_wrapper.open_session(2) as session:
            client = async_llm_wrapper.AsyncLLMClient(settings, chat_target(settings, settings.model or ""), session)
            try:
                if prepares:
                    await client.prepare(settings)
                return [
                    await async_llm_wrapper.ollama_classify_async(CONVERSATION, client, classifier)
                    for _ in range(times)
                ]
            finally:
                await client.breaker.close()

    return asyncio.run(run())


Classify = Callable[..., list[Outcome]]
BOTH = pytest.mark.parametrize("classify", [classify_sync, classify_async], ids=["sync", "async"])


def settings_for(url: str, protocol: str) -> Settings:
    return load_settings(None, llm_api_url=f"{url}{protocol}", llm_model="llama3.2", llm_backoff_s=0)


@BOTH
@pytest.mark.parametrize("protocol", ["/api/chat", "/api/generate", "/v1/chat/completions"])
def test_each_style_gives_the_same_labels(model: FakeOllama, classify: Classify, protocol: str) -> None:
    settings = settings_for(model.url, protocol)
    outcomes = {style: classify(settings, Classifier(TAXONOMY, "fit", style))[0] for style in STYLES}
    full = outcomes["full"].classification
    assert full.categorization
    for style in STYLES[1:]:
        assert outcomes[style].classification.labels == full.labels
        assert outcomes[style].classification.categorization is None
        assert "categorization" not in outcomes[style].classification.as_dict()
    tokens = [outcomes[style].reply_tokens or 0 for style in STYLES]
    assert tokens[0] > tokens[1] > tokens[2]
    assert outcomes["score"].fingerprint == outcomes["list"].fingerprint, "this server is not llama.cpp"
    assert len({outcome.fingerprint for outcome in outcomes.values()}) == len(STYLES) - 1


@BOTH
@pytest.mark.parametrize("protocol", ["/api/chat", "/v1/chat/completions"])
def test_server_without_arrays_gets_labels_for_the_rest_of_the_run(
    model: FakeOllama, classify: Classify, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    model.configure(refuses_arrays=True)
    settings = settings_for(model.url, protocol)
    first, second = classify(settings, Classifier(TAXONOMY, "fit", "list"), times=2)
    [labels] = classify(settings, Classifier(TAXONOMY, "fit", "labels"))
    assert first.classification == second.classification == labels.classification
    assert first.fingerprint == second.fingerprint == labels.fingerprint
    assert len([record for record in caplog.records if "REPLY_STYLE=labels" in record.message]) == 1
    assert model.stats()["chat_requests"] == 4


@BOTH
@pytest.mark.parametrize("style", ["list", "score"])
def test_openai_refuses_an_array_in_its_own_words(classify: Classify, style: ReplyStyle) -> None:
    text = """Invalid schema for response_format 'triad': schema must be a JSON Schema of 'type: "object"', got 'type: "array"'."""
    refusal = answer({"error": {"message": text, "type": "invalid_request_error", "param": "response_format"}}, 400)
    labels = json.dumps(dict(zip(TAXONOMY.field_names, LABELS, strict=True)))
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": labels}}
    with scripted_server(refusal, answer({"choices": [choice]})) as server:
        settings = settings_for(server.url, "/v1/chat/completions")
        [outcome] = classify(settings, Classifier(TAXONOMY, "fit", style))
        types = [sent.json["response_format"]["json_schema"]["schema"]["type"] for sent in server.chats]
    assert list(outcome.classification.labels.values()) == LABELS
    assert types == ["array", "object"]


@BOTH
def test_repair_turn_describes_the_array(classify: Classify) -> None:
    good = json.dumps(LABELS)
    with scripted_server(answer(chat_reply(json.dumps(LABELS[:2]))), answer(chat_reply(good))) as server:
        settings = load_settings(None, ollama_endpoint=server.url, ollama_model="llama3.2", llm_backoff_s=0)
        [outcome] = classify(settings, Classifier(TAXONOMY, "fit", "list"))
        repair = server.chats[1].json["messages"][-1]["content"]
    assert outcome.attempts == 2
    assert "not an array of 3 values" in repair
    assert "one JSON array of 3 values (intent, topic and sentiment, in this order), without keys," in repair


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ('["Order Status", "Shipping/Delivery"]', Reason.WRONG_SHAPE),
        ('["Order Status", "Shipping/Delivery", "Negative", "Other"]', Reason.WRONG_SHAPE),
        ('["Order Status", "Shipping/Delivery", ["Negative"]]', Reason.WRONG_SHAPE),
        ('["Order Status", "Shipping/Delivery", null]', Reason.WRONG_SHAPE),
        ('["Order Status", "Negative", "Shipping/Delivery"]', Reason.LABEL_OUTSIDE),
        ('["I1", "T2", "Negative"]', Reason.LABEL_OUTSIDE),
        ('["Order Status", "Shipping/Delivery", "Nega', Reason.NOT_JSON),
        ('{"intent": "Order Status", "topic": "Shipping/Delivery", "sentiment": "Negative"}', Reason.WRONG_SHAPE),
        ('{"labels": ["Order Status", "Shipping/Delivery", "Negative"]}', Reason.WRONG_SHAPE),
        ("Order Status", Reason.NOT_JSON),
        ("  ", Reason.EMPTY),
        ("<think>it is late</think>", Reason.EMPTY),
        ("[" * 70_000, Reason.NOT_JSON),
        ("[" * 5_000, Reason.NOT_JSON),
    ],
)
def test_array_that_is_not_exact_is_refused(reply: str, reason: Reason) -> None:
    with pytest.raises(LLMReplyError) as caught:
        Classifier(TAXONOMY, "fit", "list").parse(reply)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "reply",
    [
        '["Order Status","Shipping/Delivery","Negative"]',
        '[\n\n\t"order status" ,"SHIPPING / DELIVERY",\n"negative"\n]\n\n  ',
        '```json\n["Order Status", "Shipping/Delivery", "Negative"]\n```',
        '<think>["Complaint", "Other", "Neutral"]</think>["Order Status", "Shipping/Delivery", "Negative"]',
        'Not ["Complaint"], but ["Order Status", "Shipping/Delivery", "Negative"].',
    ],
)
def test_array_is_read_with_fence_prose_and_reasoning(reply: str) -> None:
    found = Classifier(TAXONOMY, "fit", "list").parse(reply)
    assert list(found.labels.values()) == LABELS


def test_labels_style_refuses_an_array() -> None:
    with pytest.raises(LLMReplyError):
        Classifier(TAXONOMY, "fit", "labels").parse(json.dumps(LABELS))


def test_multi_valued_field_is_an_array_inside(tmp_path: Path) -> None:
    classifier = Classifier(of_fields(tmp_path), "fit", "list")
    found = classifier.parse('["Order Status", "Other", "Neutral", ["Chat", "phone"]]')
    assert found.channels == ("Phone", "Chat")
    assert '["<intent>","<topic>","<sentiment>",["<channels>"]]' in classifier.system_prompt
    for reply in ('["Order Status", "Other", "Neutral", "Chat"]', '["Order Status", "Other", "Neutral", []]'):
        with pytest.raises(LLMReplyError, match="not a list of labels: channels"):
            classifier.parse(reply)


@pytest.mark.parametrize("style", STYLES)
def test_examples_of_the_prompt_are_answers_of_the_style(style: ReplyStyle) -> None:
    """The short ones without white space, which a model would copy."""
    section = build_system_prompt(TAXONOMY, style).split("EXAMPLES:\n")[1]
    answers = [line for line in section.splitlines() if line[:1] in ("{", "[")]
    classifier = Classifier(TAXONOMY, "fit", style)
    assert len(answers) == 4
    assert len({classifier.parse(line).intent for line in answers}) == 4
    if style != "full":
        assert all(line == json.dumps(json.loads(line), separators=(",", ":")) for line in answers)
        assert "categorization" not in build_system_prompt(TAXONOMY, style)


def test_prompts_get_shorter_with_the_style(tmp_path: Path) -> None:
    lengths = [len(build_system_prompt(TAXONOMY, style)) for style in STYLES]
    assert lengths == sorted(lengths, reverse=True)
    assert "EXAMPLES" not in build_system_prompt(of_fields(tmp_path), "list")  # an example cannot leave a field out


def test_schema_of_the_list_has_no_items_beside_prefix_items(tmp_path: Path) -> None:
    """llama.cpp reads ``items`` alone if both are there."""
    schema: dict[str, Any] = classification_schema(of_fields(tmp_path), "list")
    assert set(schema) == {"type", "prefixItems", "minItems", "maxItems"}
    assert schema["minItems"] == schema["maxItems"] == len(schema["prefixItems"]) == 4
    assert [item["type"] for item in schema["prefixItems"]] == ["string"] * 3 + ["array"]


@pytest.mark.parametrize("style", STYLES)
def test_confidence_is_the_probability_of_the_labels_in_each_style(model: FakeOllama, style: ReplyStyle) -> None:
    model.configure(logprobs={"Positive": 0.4, "Neutral": 0.4, "Negative": 0.4, "*": 0.9})
    settings = settings_for(model.url, "/api/chat")
    with llm_wrapper.open_session() as session:
        target = chat_target(settings, "llama3.2")
        client = llm_wrapper.LLMClient(settings, replace(target, logprobs=True), session)
        outcome = llm_wrapper.ollama_classify(CONVERSATION, client, Classifier(TAXONOMY, "fit", style))
    assert outcome.confidence == pytest.approx({"intent": 0.9, "topic": 0.9, "sentiment": 0.4}, abs=0.01)


@pytest.mark.thorough
def test_service_answers_without_sentence_and_its_document_allows_that(model: FakeOllama, tmp_path: Path) -> None:
    with serve(tmp_path, OLLAMA_ENDPOINT=model.url, OLLAMA_MODEL="llama3.2", REPLY_STYLE="list") as service:
        given = service.classify()
        document = service.request("GET", "/openapi.json").json
    assert given.status == 200, given.body
    assert list(given.json["classification"]) == ["intent", "topic", "sentiment"]
    schemas = document["components"]["schemas"]
    assert schemas["Labels"]["required"] == ["intent", "topic", "sentiment"]
    assert "categorization" not in schemas["ClassificationResponse"]["examples"][0]["classification"]
    assert main.app.openapi()["components"]["schemas"]["ClassificationResponse"]["examples"][0][
        "classification"
    ].keys() > {"categorization"}, "the document of other services in this process is unchanged"


def test_script_answers_without_sentence(model: FakeOllama) -> None:
    settings = load_settings(None, ollama_endpoint=model.url, ollama_model="llama3.2", reply_style="labels")
    found = api.classify_conversation(
        {"conversation_number": "1", "messages": [{"sender": "customer", "text": "where is it?"}]}, settings
    )
    assert list(found.model_dump()["classification"]) == ["intent", "topic", "sentiment"]


@pytest.mark.parametrize("style", mostly_thorough(STYLES, 4))
def test_engine_writes_an_answer_of_each_style(engine: TinyEngine, style: ReplyStyle, tmp_path: Path) -> None:
    """llama.cpp compiles the schema and its grammar leads random weights to an answer that the parser takes."""
    outcome, _, client = asked_of_engine(engine, Classifier(of_fields(tmp_path), "fit", style), prepares=False)
    assert not client.target.refuses_arrays
    assert outcome.attempts == 1
    assert outcome.confidence is not None
    assert set(outcome.classification.labels) == set(outcome.confidence) == {*TAXONOMY.field_names, "channels"}


@pytest.mark.parametrize("style", ["labels", "list"])
def test_engine_that_takes_grammars_writes_no_white_space(
    engine: TinyEngine, style: ReplyStyle, tmp_path: Path
) -> None:
    """llama.cpp is known by its list of models. The grammar of a schema would permit white space after each token."""
    outcome, reply, client = asked_of_engine(engine, Classifier(of_fields(tmp_path), "fit", style))
    assert client.target.engine == "llamacpp"
    assert "grammar" not in client.target.refused
    assert reply == json.dumps(json.loads(reply), separators=(",", ":"))
    assert outcome.attempts == 1
    assert outcome.confidence is not None


def asked_of_engine(
    engine: TinyEngine, classifier: Classifier, *, prepares: bool = True
) -> tuple[Outcome, str, llm_wrapper.LLMClient]:
    """Return the outcome, the text of the reply and the client, which knows the engine if it *prepares*."""
    settings = load_settings(None, llm_api_url=f"{engine.url}/v1/chat/completions", llm_model=MODEL_NAME)
    with llm_wrapper.open_session() as session:
        target = replace(chat_target(settings, MODEL_NAME), logprobs=True)
        client = llm_wrapper.LLMClient(settings, target, session)
        if prepares:
            client.prepare(settings)
        outcome = llm_wrapper.ollama_classify(CONVERSATION, client, classifier)
        reply = client.chat(classifier.messages(CONVERSATION.transcript), classifier.schema_json)
    return outcome, reply.text, client


@BOTH
def test_server_that_refuses_grammars_gets_the_schema(classify: Classify) -> None:
    refusal = answer({"error": {"message": "grammar is not supported with this build"}}, 400)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(LABELS)}}
    good = answer({"choices": [choice]})
    with scripted_server(refusal, good, good) as server:
        server.models = answer({"data": [{"id": "llama3.2", "owned_by": "llamacpp"}]})
        settings = settings_for(server.url, "/v1/chat/completions")
        outcomes = classify(settings, Classifier(TAXONOMY, "fit", "list"), times=2, prepares=True)
        forms = [[name for name in ("grammar", "response_format") if name in sent.json] for sent in server.chats]
    assert forms == [["grammar"], ["response_format"], ["response_format"]]
    assert all(list(outcome.classification.labels.values()) == LABELS for outcome in outcomes)


def test_grammar_of_odd_labels_is_escaped() -> None:
    schema = {"type": "array", "prefixItems": [{"type": "string", "enum": ['say "hi"', "back\\slash", "naïve"]}]}
    grammar = compact_grammar(json.dumps(schema).encode())
    assert grammar == ('root ::= "[" ("\\"say \\\\\\"hi\\\\\\"\\"" | "\\"back\\\\\\\\slash\\"" | "\\"naïve\\"") "]"\n')
    assert compact_grammar(b'{"type": "object", "properties": {"text": {"type": "string"}}}') is None
    assert compact_grammar(b"{}") is None


def piece(text: str, share: float = 0.9, other: str = "") -> dict[str, Any]:
    """A token of an answer with *share* of the probability, and one alternative with the rest."""
    entries = [
        {"token": one, "logprob": math.log(part), "bytes": list(one.encode())}
        for one, part in ((text, share), (other or "The", 1 - share))
    ]
    return {**entries[0], "top_logprobs": entries}


def test_confidence_of_an_array_goes_by_position() -> None:
    """Two fields with the same label; each alternative belongs to its own field."""
    classifier = Classifier(TAXONOMY, "fit", "list")
    text = '["Other","Other","Neutral"]'
    tokens = (
        *(piece('["'), piece("Other", 0.6, "Complaint"), piece('","'), piece("Other", 0.8, "Insurance/Loans/Credit")),
        *(piece('","'), piece("Neutral", 0.7, "Negative"), piece('"]')),
    )
    found = classifier.confidence(ChatReply(text, 1, 1, tokens=tokens), classifier.parse(text))
    assert found is not None
    assert 0 < found["intent"] < found["topic"] <= 0.8
    assert found["intent"] <= 0.6
    twice = f"{text} {text}"
    assert classifier.confidence(ChatReply(twice, 1, 1, tokens=tokens), classifier.parse(twice)) is None
