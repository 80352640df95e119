"""The fields of a taxonomy in prompt, schema, parser, repair, confidence and baseline; and today's contract."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from classifier import Classifier, classification_schema
from config import Taxonomy, load_taxonomy
from config.service_settings import load_service_settings
from domain.confidence import label_confidence
from domain.conversation import Classification, Conversation, Turn
from embedded.baseline import BaselineClassifier
from error_handler import LLMReplyError, Reason
from main import create_app
from model_server.protocol import ChatReply, ChatTarget
from prompt_builder import build_system_prompt
from service.openapi import openapi_document

OWN = """
intents: {Order Status: where it is, Change Request: another day, Other: anything else}
topics: {Shipping/Delivery: parcels, Travel Booking: trips}
sentiments: [Positive, Negative]
"""
FIELDS = """
fields:
  urgency:
    definition: How soon the customer needs an answer.
    labels: {High: today, Normal: {definition: tomorrow, phrases: [no rush]}}
  channels:
    definition: Channels that the customer used
    multiple: true
    labels:
      Phone: {definition: called, phrases: [phone, called]}
      Chat: {definition: wrote in the chat, phrases: [chat]}
      Mail: wrote a letter
      Other: {definition: none, phrases: []}
"""
LABELS = {"intent": "Order Status", "topic": "Travel Booking", "sentiment": "Negative", "urgency": "High"}


def taxonomy_of(folder: Path, content: str) -> Taxonomy:
    path = folder / "own.yaml"
    path.write_text(content, encoding="utf-8")
    return load_taxonomy(path)


@pytest.fixture
def taxonomy(tmp_path: Path) -> Taxonomy:
    return taxonomy_of(tmp_path, OWN + FIELDS)


@pytest.fixture
def classifier(taxonomy: Taxonomy) -> Classifier:
    return Classifier(taxonomy)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "prompt", "schema"),
    [
        pytest.param(
            None,
            "f6b8a7435a1735edb2302d92c2f29b79e5e273bfb8bbfab895eba3b5d2e68c46",
            "b252886d59770fad4b19e95fd13a406654b7ba3bc851f323f0ab3f695d84c01a",
            id="shipped",
        ),
        pytest.param(
            OWN.replace("where it is", "a").replace("another day", "b").replace("anything else", "c")
            .replace("parcels", "a").replace("trips", "b"),
            "c258a3d8685159d4a994fcf4dba2236ef6f50a868c557147fc17697941be6096",
            "c600e15a3374959178c1a1afb43a0a8d67461709c978dd29efaf9fed0110d8cb",
            id="replaced",
        ),
    ],
)  # fmt: skip
def test_prompt_and_schema_of_a_file_without_fields_are_those_of_version_1(
    tmp_path: Path, content: str | None, prompt: str, schema: str
) -> None:
    """Recorded before fields existed: another byte would make every stored result stale."""
    classifier = Classifier(taxonomy_of(tmp_path, content) if content else load_taxonomy())
    assert sha256(classifier.system_prompt.encode()) == prompt
    assert sha256(classifier.schema_json) == schema


def test_plan_fingerprint_of_the_shipped_file_is_that_of_version_1() -> None:
    ollama = "http://localhost:11434"
    target = ChatTarget("ollama_chat", ollama, ollama, "llama3.2", "d1", 8192, "0")
    plan = Classifier(load_taxonomy()).plan(target)
    assert plan == "648d33bc728da921bf2bc8b7007dc0d9f62e69b7f6f4afaad1220c268060e3cf"


def test_openapi_of_the_shipped_file_is_that_of_version_1() -> None:
    """The labels of a classification and of a similar conversation: one schema, without lists of labels."""
    document = openapi_document(create_app(), load_service_settings(None), load_taxonomy())
    described = {
        "intent": "what the customer wants",
        "topic": "what it is about",
        "sentiment": "how the customer feels",
        "categorization": "one line in plain words",
    }
    schemas = document["components"]["schemas"]
    assert json.dumps(schemas["Labels"]) == json.dumps(
        {
            "properties": {
                name: {"type": "string", "title": name.capitalize(), "description": text}
                for name, text in described.items()
            },
            "type": "object",
            "required": list(described),
            "title": "Labels",
            "description": "The classification of the conversation; the labels are those of the taxonomy.",
        }
    )
    reference = {"$ref": "#/components/schemas/Labels"}
    assert schemas["SimilarConversation"]["properties"]["classification"] == reference
    assert schemas["ClassificationResponse"]["properties"]["classification"] == reference
    assert "PastLabels" not in schemas
    assert document["info"]["description"].startswith(
        "Classifies one support conversation at a time: intent, topic and"
    )


def test_openapi_lists_the_labels_of_other_fields(taxonomy: Taxonomy) -> None:
    """A conversation that was labelled before a field existed has none, so the schema of /similar is wider."""
    schemas = openapi_document(create_app(), load_service_settings(None), taxonomy)["components"]["schemas"]
    urgency, channels = (schemas["Labels"]["properties"][name] for name in ("urgency", "channels"))
    assert urgency == {
        "type": "string",
        "enum": ["High", "Normal"],
        "title": "Urgency",
        "description": "How soon the customer needs an answer.",
    }
    assert (channels["type"], channels["minItems"], channels["uniqueItems"]) == ("array", 1, True)
    assert channels["items"] == {"type": "string", "enum": ["Phone", "Chat", "Mail", "Other"]}
    assert schemas["Labels"]["required"] == [*taxonomy.field_names, "categorization"]
    assert schemas["SimilarConversation"]["properties"]["classification"]["$ref"].endswith("/PastLabels")
    assert "enum" not in json.dumps(schemas["PastLabels"])
    example = schemas["ClassificationResponse"]["examples"][0]["classification"]
    assert (example["urgency"], example["channels"]) == ("High", ["Phone"])


def test_prompt_has_a_rule_and_the_labels_of_each_field(taxonomy: Taxonomy) -> None:
    prompt = build_system_prompt(taxonomy)
    assert '"sentiment": "...", "urgency": "...", "channels": ["..."]}\n' in prompt
    rule = "4. urgency: How soon the customer needs an answer. Exactly one label from URGENCY.\n"
    assert rule in prompt
    assert (
        "5. channels: Channels that the customer used. All labels from CHANNELS that fit.\n6. categorization" in prompt
    )
    assert "When two fit where one is allowed, take the one" in prompt
    assert "take Other, or the closest label of a list without Other.\n" in prompt
    assert "URGENCY:\n- High: today\n- Normal: tomorrow\n" in prompt
    assert "no rush" not in prompt


@pytest.mark.parametrize(
    ("definition", "rule"),
    [
        ("Does the customer ask for a manager?", "1. escalate: Does the customer ask for a manager? Exactly one label"),
        ("A manager is asked for", "1. escalate: A manager is asked for. Exactly one label"),
        ('""', "1. escalate: exactly one label"),
    ],
)
def test_rule_of_a_field_is_made_of_sentences(tmp_path: Path, definition: str, rule: str) -> None:
    own = f"fields:\n  escalate:\n    labels: [Yes, No, Other]\n    definition: {definition}\n"
    prompt = build_system_prompt(taxonomy_of(tmp_path, own))
    assert f"{rule} from ESCALATE.\n" in prompt
    assert (
        "When two fit, take the one that matches what the customer asks for last. When none fits, take Other.\n"
        in prompt
    )


def test_examples_have_the_keys_that_the_taxonomy_has(tmp_path: Path, taxonomy: Taxonomy) -> None:
    """None has labels of other fields, and the heading says which are left out."""
    _, examples = build_system_prompt(taxonomy).split("EXAMPLES (without urgency, channels):\n")
    answers = [json.loads(line) for line in examples.splitlines() if line.startswith("{")]
    assert {tuple(answer) for answer in answers} == {("categorization", "intent", "topic", "sentiment")}
    shorter = taxonomy_of(tmp_path, OWN.replace("sentiments: [Positive, Negative]", "categorization: false") + FIELDS)
    answers = [json.loads(line) for line in build_system_prompt(shorter).splitlines() if line.startswith('{"intent')]
    assert {tuple(answer) for answer in answers[1:]} == {("intent", "topic")}
    alone = build_system_prompt(taxonomy_of(tmp_path, "categorization: false" + FIELDS))
    assert "EXAMPLES" not in alone
    assert "INTENTS" not in alone
    assert "categorization" not in alone


def test_schema_of_an_answer_has_lists_of_labels(taxonomy: Taxonomy) -> None:
    """uniqueItems is missing on purpose: some grammar compilers refuse it."""
    schema = classification_schema(taxonomy)
    assert schema["required"] == ["categorization", *taxonomy.field_names]
    assert schema["properties"]["urgency"] == {"type": "string", "enum": ["High", "Normal"]}
    assert schema["properties"]["channels"] == {
        "type": "array",
        "items": {"type": "string", "enum": ["Phone", "Chat", "Mail", "Other"]},
        "minItems": 1,
        "maxItems": 4,
    }


def reply_of(**changes: Any) -> str:
    return json.dumps({"categorization": "Late.", **LABELS, "channels": ["Chat"], **changes})


def test_labels_of_a_list_are_stored_once_in_the_order_of_the_taxonomy(classifier: Classifier) -> None:
    found = classifier.parse(reply_of(channels=["other", "PHONE", "Phone"], urgency="normal"))
    assert found == Classification(
        categorization="Late.", **{**LABELS, "urgency": "Normal"}, channels=("Phone", "Other")
    )
    assert found.as_dict() == {
        **LABELS, "urgency": "Normal", "channels": ["Phone", "Other"], "categorization": "Late."
    }  # fmt: skip
    assert Classification(**found.as_dict()) == found
    assert (found.urgency, found.channels, found.categorization) == ("Normal", ("Phone", "Other"), "Late.")
    with pytest.raises(AttributeError, match="no field urgent"):
        _ = found.urgent


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"channels": "Chat"}, Reason.WRONG_SHAPE, "not a list of labels: channels"),
        ({"channels": []}, Reason.WRONG_SHAPE, "not a list of labels: channels"),
        ({"channels": ["Chat", 5]}, Reason.WRONG_SHAPE, "not a list of labels: channels"),
        ({"channels": ["Chat", "Fax"]}, Reason.LABEL_OUTSIDE, "channels is not a label"),
        ({"urgency": ["High"]}, Reason.WRONG_SHAPE, "not a text: urgency"),
        ({"urgency": "Now"}, Reason.LABEL_OUTSIDE, "urgency is not a label"),
    ],
)
def test_unusable_label_names_its_field(
    classifier: Classifier, changes: dict[str, Any], reason: Reason, said: str
) -> None:
    with pytest.raises(LLMReplyError, match=said) as caught:
        classifier.parse(reply_of(**changes))
    assert caught.value.reason is reason
    turn = classifier.repair_messages([], ChatReply("{}", None, None), caught.value)[-1]["content"]
    assert "exactly the keys categorization, intent, topic, sentiment, urgency and channels," in turn


def test_answer_without_categorization_is_accepted_if_the_taxonomy_has_none(tmp_path: Path) -> None:
    classifier = Classifier(taxonomy_of(tmp_path, "categorization: false\nfields: {escalate: [Yes, No]}"))
    found = classifier.parse('{"escalate": "yes"}')
    assert found.categorization is None
    assert found.as_dict() == {"escalate": "Yes"}
    turn = classifier.repair_messages([], ChatReply("{}", None, None), LLMReplyError("x", Reason.WRONG_SHAPE))[-1]
    assert "exactly the key escalate," in turn["content"]


def entry(token: str, probability: float, **others: float) -> dict[str, Any]:
    listed = {token: probability, **others}
    tops = [{"token": text, "logprob": math.log(share), "bytes": list(text.encode())} for text, share in listed.items()]
    return {**tops[0], "top_logprobs": tops}


def test_confidence_of_a_list_is_the_product_of_its_labels() -> None:
    """Other labels of the list are no competitors; those outside are."""
    labels = {"channels": ("Phone", "Chat", "Mail")}
    plain = {"The": 0.5}
    tokens = [
        entry('{"channels": ["', 0.5, **plain),
        entry('Chat"', 0.4, **{'Phone"': 0.4, 'Mail"': 0.1}),
        entry(', "', 0.5, **plain),
        entry('Phone"', 0.6, **{'Mail"': 0.2, 'Chat"': 0.1}),
        entry("]}", 0.5, **plain),
    ]
    reply = '{"channels": ["Chat", "Phone"]}'
    found = label_confidence(tokens, reply, Classification(channels=["Phone", "Chat"]), labels)
    assert found == {"channels": pytest.approx((0.4 / 0.5) * (0.6 / 0.8), abs=1e-3)}
    odd = [entry(token["token"].replace("Chat", "chat"), 0.5, **plain) for token in tokens]
    assert label_confidence(odd, reply.replace("Chat", "chat"), Classification(channels=["Chat"]), labels) is None


def said(*texts: str) -> Conversation:
    return Conversation("messages", None, tuple(Turn("customer", text) for text in texts), len(texts))


def test_baseline_labels_other_fields_by_their_phrases(taxonomy: Taxonomy) -> None:
    """Without a phrase: Other, or the last label. A list has each label with a phrase."""
    taxonomy = Taxonomy(tuple(field for field in taxonomy.fields if field.name != "sentiment"))
    baseline = BaselineClassifier(taxonomy)
    found = baseline.classify(said("I called and used your chat. No rush."))
    assert (found.urgency, found.channels) == ("Normal", ("Phone", "Chat"))
    nothing = baseline.classify(said("hello"))
    assert (nothing.urgency, nothing.channels) == ("Normal", ("Other",))
    assert list(found.labels) == list(taxonomy.field_names)


def test_baseline_needs_no_triad(tmp_path: Path) -> None:
    baseline = BaselineClassifier(taxonomy_of(tmp_path, FIELDS))
    assert baseline.classify(said("by phone")).as_dict() == {
        "urgency": "Normal", "channels": ["Phone"], "categorization": "Baseline: Normal"
    }  # fmt: skip
    silent = BaselineClassifier(taxonomy_of(tmp_path, "categorization: false" + FIELDS))
    assert silent.classify(said("by phone")).categorization is None
