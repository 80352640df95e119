"""Records what the code before the move into packages leaves behind; test_previous_version.py picks it up with other code.

    cd TREE && PYTHONPATH=. .venv/bin/python /path/to/make_previous_version.py TARGET

TREE is a checkout of the old code, TARGET the folder that gets the files. It runs the old worker, the old document job
and the old index as real processes, against a real mongod, the fake Ollama and the fake OpenAI of the tests. The module
names below are those of the old code on purpose.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bson import Int64, ObjectId
from bson.binary import Binary
from pymongo import MongoClient
from pymongo.database import Database
from tests.fake_ollama import FakeOllama
from tests.fake_openai import FakeOpenAI
from tests.faulty_job import run_killed
from tests.openai_job import Place
from utils.embedded_mongod import EmbeddedMongod
from utils.extended_json import canonical, id_key, loads

from config.index_settings import load_index_settings
from config.openai_settings import load_openai_settings
from config.service_settings import load_service_settings
from config.settings import known_environment_names, load_settings
from openai_batch.processor import job_slug
from tests.forked_process import run_forked
from tests.worker import ROOT, Site, open_site

DATABASE = "previous_version"
SOURCE, RESULTS, LEASES = "conversation_set", "sentimental_analysis", "conversation_set_leases"
Document = dict[str, Any]

# The worker

BATCH_SIZE, CONCURRENCY = 8, 4
KILLED_AT = {"seam": "before_write", "passage": 24}
REFUSED, MISLABELLED = "order number R-4711", "order number W-4711"
FAULTS = [
    {"kind": "status", "status": 400, "body": {"error": "this request is refused"}, "when": {"text": REFUSED}},
    {"kind": "wrong_label", "when": {"text": MISLABELLED}},
]
WORKER_SETTINGS = {
    "OLLAMA_MODEL": "llama3.2",
    "LLM_BACKOFF_S": "0.05",
    "MONGODB_BACKOFF_S": "0.2",
    "BATCH_SIZE": str(BATCH_SIZE),
    "MAX_CONCURRENT": str(CONCURRENCY),
    "LLM_TIMEOUT_S": "20",
}
SAMPLES_OF_TEXT_IDS, SAMPLES_OF_OBJECT_IDS = 14, 28
EXTRA_EVERY = 3  # samples with an ObjectId between two extras
ATTEMPTS = 20

# Files of SQLite and ChromaDB are mostly zeros; they are kept as NAME.gz.
PACKED_FROM_BYTES = 20_000

# The document job

JOB_DOCUMENTS, JOB_LINES = 10, 4
JOB_POINT = ("openai_client.OpenAIFiles.create:after", 3)
JOB_SCHEMA = '''"""The schema file of the job: an operator's own, written for the version that made the ledger."""

from openai_batch import BatchConfig, DocumentFields, PromptConfig, SchemaConfig

schema_config = SchemaConfig()
fields = DocumentFields(field_map={"text": "text"})
prompts = PromptConfig(user_prompt_template="Summarise: {{ text }}")
batch = BatchConfig(batch_size=4, max_lines=4)
'''

# The index

DIMENSIONS = 8

ENV = """\
# A .env of the version before the move: other names where a variable has one, quotes, comments, an empty value.
MONGODB_CONNECTION_STRING=mongodb://worker:s3cret@db.example.org:27018/?replicaSet=rs0
MONGODB_DATABASE_NAME=support_archive
MONGODB_QUERIES_COLLECTION=tickets
MONGODB_RESULTS_COLLECTION='tickets.labels'
MONGODB_MAX_RETRIES=5
MONGODB_BACKOFF_S=0.25
MONGODB_TIMEOUT_MS=15000

MONGODB_BATCH_SIZE=250
MAX_CONCURRENT=AUTO
BATCH_PROCESSOR_MODE=continuous
export BATCH_FILES_DIR="state of worker 1"
SHUTDOWN_GRACE_S=45
LEASE_S=600
REVIEW_BELOW=0.8
STORE_ORIGINAL_CONVERSATION=yes
TAXONOMY_FILE=labels/our_taxonomy.yaml
LOG_LEVEL=warning

OLLAMA_ENDPOINT=http://gpu-1.example.org:11434/
OLLAMA_MODEL=qwen3:8b
OLLAMA_NUM_CTX=16384
ON_LONG=skip
LLM_LOAD_TIMEOUT_S=900
OLLAMA_KEEP_ALIVE=1h30m
LLM_API_URL=https://llm.example.org/v1/chat/completions
LLM_MODEL=our-model # served by vLLM
LLM_API_KEY=key-of-the-model-server
LLM_TIMEOUT_S=90.5
LLM_MAX_ATTEMPTS=4
LLM_BACKOFF_S=1.5
OUTAGE_LIMIT_S=1800

API_HOST=0.0.0.0
API_PORT=8080
API_KEYS="shop:0123456789abcdef0123, desk:fedcba9876543210fedc"
API_ALLOW_UNAUTHENTICATED=false
API_MAX_CONCURRENT=12
API_QUEUE_SIZE=40
API_REQUEST_TIMEOUT_S=30
API_HEADER_TIMEOUT_S=5
API_BODY_TIMEOUT_S=6
API_RATE_LIMIT_PER_MINUTE=120
API_MAX_BODY_BYTES=131072
API_MAX_MESSAGES=200
API_MAX_TEXT_CHARACTERS=20000
API_IDEMPOTENCY_RETENTION_S=3600
API_IDEMPOTENCY_MAX_KEYS=500
API_EXPOSE_DOCS=off
API_EXPOSE_METRICS=public
API_EMBEDDED=true

OPENAI_API_KEY=sk-of-the-previous-version
OPENAI_BASE_URL=https://proxy.example.org/openai/v1
OPENAI_MODEL=gpt-4o
OPENAI_TEMP=0.3
OPENAI_MAX_TOKENS=700
COMPLETION_WINDOW=24h
POLL_INTERVAL=60
MAX_RETRIES=2
SYSTEM_PROMPT="You summarise. Answer with JSON only."
USER_PROMPT_TEMPLATE='Summarise: {{ text }}'
NOTIFICATION_WEBHOOK=https://hooks.example.org/batches
NOTIFICATION_WEBHOOK_SECRET=signed-with-this
NOTIFICATION_EMAIL=operator@example.org
SMTP_SERVER=mail.example.org:587
SMTP_LOGIN=operator:mail-password
SMTP_FROM=triad@example.org
ALLOW_EXTERNAL_LLM=1

EMBEDDING_PROVIDER=openai
EMBEDDING_MODEL=text-embedding-3-large
EMBEDDING_DIMENSIONS=256
EMBEDDING_BATCH_SIZE=64
EMBEDDING_MAX_RETRIES=1
EMBEDDING_CONCURRENCY=2
EMBEDDING_TIMEOUT_S=45
DATABASE_URL=postgresql://reader:p%40ss@pg.example.org/shop
INDEX_DIR=index/of/the/shop
LOG_FILE=
"""


def main(target: Path) -> None:
    """Record all files again."""
    for name in ("state", "index", "openai_job"):
        shutil.rmtree(target / name, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="previous_version_") as name:
        folder = Path(name)
        with EmbeddedMongod(folder / "mongod") as mongod:
            record_worker(mongod.uri, folder, target)
            record_job(mongod.uri, folder / "job", target / "openai_job")
    record_settings(target)


# The worker


def conversation(document_id: Any, number: str, text: str, sender: str = "customer") -> Document:
    """Return a made-up conversation of one turn."""
    messages = [{"sender": sender, "timestamp": "2025-03-01T10:00:00Z", "text": text}]
    return {"_id": document_id, "conversation_number": number, "messages": messages, "status": "pending"}


def documents() -> list[Document]:
    """Return samples with ids of several types, and between them those that fail, are skipped, or say the same again."""
    lines = (ROOT / "data/sample_conversations.jsonl").read_bytes().splitlines()
    samples = [loads(line) for line in lines]
    text_ids = [sample for sample in samples if isinstance(sample["_id"], str)][:SAMPLES_OF_TEXT_IDS]
    object_ids = sorted(
        (sample for sample in samples if isinstance(sample["_id"], ObjectId)), key=lambda sample: sample["_id"]
    )[:SAMPLES_OF_OBJECT_IDS]
    made = [
        conversation(1, "9001", "My parcel has been on its way for three weeks and nobody answers."),
        conversation(Int64(2**40), "9002", "Your new app is a pleasure, thank you!"),
        conversation(3, "9003", f"Please cancel {REFUSED}."),
        conversation(4, "9004", f"Where is {MISLABELLED}-1?"),
        conversation(5, "9005", "Can we help you with anything else?", sender="agent"),
        *text_ids,
        conversation({"shop": 1, "ticket": 7}, "9006", "I was charged twice for the same month."),
    ]
    extras = 0
    for place, sample in enumerate(object_ids):
        made.append(sample)
        if place % EXTRA_EVERY == EXTRA_EVERY - 1:
            made.append(extra(extras, sample, text_ids))
            extras += 1
    return made


def extra(number: int, before: Document, text_ids: list[Document]) -> Document:
    """Return a document that comes right after *before*: a copy of it, one that fails, one to skip, a copy of an early one."""
    document_id = ObjectId((int(str(before["_id"]), 16) + 1).to_bytes(12, "big"))
    kind = number % 4
    if kind == 0:
        return {**before, "_id": document_id, "conversation_number": f"91{number:02d}"}
    if kind == 1:
        return conversation(document_id, f"91{number:02d}", f"Where is {MISLABELLED}-{number + 1}?")
    if kind == 2:
        return conversation(document_id, f"91{number:02d}", "Is there anything else?", sender="agent")
    return {**text_ids[number], "_id": document_id}


def record_worker(uri: str, folder: Path, target: Path) -> None:
    """Kill the worker until it left everything that can be left; then record that, and the index of what has results."""
    with FakeOllama(slots=CONCURRENCY, latency="lognormal", latency_key="text", user_message=0) as model:
        for attempt in range(ATTEMPTS):
            model.reset()
            model.configure(faults=FAULTS, mean_s=0.3, sigma=0.3, seed=attempt)
            with open_site(uri, DATABASE, model, folder / f"worker{attempt}") as site:
                site.settings = dict(WORKER_SETTINGS)
                site.database.client.drop_database(DATABASE)
                site.source.insert_many(documents())
                ended = site.run(plan=KILLED_AT)
                assert ended.code == -signal.SIGKILL, ended.err
                facts = what_was_left(site)
                print({name: len(value) for name, value in facts.items()})
                if all(facts[name] for name in MUST_BE_THERE):
                    keep_folder(site.directory, target / "state")
                    dump(site.database, target, {SOURCE: "source", RESULTS: "results", LEASES: "leases"})
                    facts["calls"] = model.stats()["calls_by_sha"]
                    write_json(target / "facts.json", facts)
                    record_index(uri, folder / "index_run", target / "index")
                    return
    raise SystemExit("The worker never left everything; change KILLED_AT.")


MUST_BE_THERE = (
    *("with_result", "answered_in_journal", "in_flight", "failed_in_journal", "skipped_in_journal"),
    *("retry", "quarantine", "completed", "stored_and_unmarked", "never_read", "copies_to_come", "low_water_mark"),
)


def what_was_left(site: Site) -> dict[str, Any]:
    """Return who was where when the worker died: lists of ids, as canonical Extended JSON."""
    results = {id_key(result["source_conversation_id"]) for result in site.results.find()}
    events: list[Document] = []
    for path in site.files("pending/*.journal"):
        events += [loads(line) for line in path.read_bytes().splitlines()]
    seen = {kind: {id_key(event["id"]) for event in events if event["e"] == kind} for kind in EVENTS}
    ended = seen["answered"] | seen["failed"] | seen["skipped"]
    read = seen["started"] | results | {id_key(entry["conversation_id"]) for entry in failed(site)}
    at_hand = {
        id_key(entry["_id"])
        for path in site.files("pending/*.json")
        for entry in loads(path.read_bytes())["conversations"]
    }
    completed = [key for path in site.files("completed/*.json") for key in loads(path.read_bytes())["conversation_ids"]]
    answered_texts = {said(document) for document in site.source.find() if id_key(document["_id"]) in results | ended}
    checkpoint = loads((site.directory / "checkpoint.json").read_bytes())

    def ids(keys: set[bytes]) -> list[str]:
        return [
            canonical(document["_id"])
            for document in site.source.find().sort("_id", 1)
            if id_key(document["_id"]) in keys
        ]

    unread = {
        id_key(document["_id"])
        for document in site.source.find()
        if id_key(document["_id"]) not in read | at_hand | {id_key(value) for value in completed}
    }
    return {
        "with_result": ids(results),
        "answered_in_journal": ids(seen["answered"] - results),
        "in_flight": ids((seen["asked"] - ended) - seen["released"]),
        "waiting_for_the_same_text": ids(seen["released"] - ended),
        "failed_in_journal": ids(seen["failed"]),
        "skipped_in_journal": ids(seen["skipped"]),
        "saved_and_not_started": ids(at_hand - seen["started"]),
        "retry": ids({id_key(entry["conversation_id"]) for entry in site.entries("retry")}),
        "quarantine": ids({id_key(entry["conversation_id"]) for entry in site.entries("quarantine")}),
        "completed": [canonical(value) for value in completed],
        "stored_and_unmarked": ids(
            {id_key(document["_id"]) for document in site.source.find({"status": "processing"})} & results
        ),
        "never_read": ids(unread),
        "copies_to_come": ids(
            {id_key(d["_id"]) for d in site.source.find() if id_key(d["_id"]) in unread and said(d) in answered_texts}
        ),
        "low_water_mark": [canonical(checkpoint["low_water_mark"])] if checkpoint["has_mark"] else [],
        "files": [str(path.relative_to(site.directory)) for path in site.files()],
    }


EVENTS = ("started", "asked", "released", "answered", "failed", "skipped")


def failed(site: Site) -> list[Document]:
    """Return the entries of retry queue and quarantine."""
    return site.entries("retry") + site.entries("quarantine")


def said(document: Document) -> str:
    """Return what makes two conversations the same."""
    return json.dumps([document.get("tweets"), document.get("messages"), document.get("text")], default=str)


# The index


def record_index(uri: str, folder: Path, target: Path) -> None:
    """Index the sample database, then the conversations that have a result."""
    folder.mkdir()
    with FakeOpenAI(dimensions=DIMENSIONS) as fake:
        own = {name: value for name, value in os.environ.items() if name not in known_environment_names()}
        environment = own | {
            "EMBEDDING_PROVIDER": "openai",
            "OPENAI_BASE_URL": fake.url,
            "OPENAI_API_KEY": "sk-any",
            "MONGODB_URI": uri,
            "MONGODB_DB": DATABASE,
            "PYTHONPATH": str(ROOT),
        }
        for flags in (["--sample"], ["--source", "conversations"]):
            command = [ROOT / "cli.py", "index", "--batch", *flags, "--index-dir", "index", "--json"]
            done = run_forked(command, environment, folder)
            assert done.returncode == 0, done.stderr
    keep_folder(folder / "index", target)


# The document job


def record_job(uri: str, folder: Path, target: Path) -> None:
    """Kill a job when its third batch has been made and before the ledger knows of it."""
    folder.mkdir()
    target.mkdir()
    (target / "schema.py").write_text(JOB_SCHEMA, encoding="utf-8")
    with FakeOpenAI(directory=folder / "openai") as fake, MongoClient[Document](uri) as client:
        items = client[DATABASE]["items"]
        items.insert_many(
            [
                {"_id": number, "ai_status": "pending", "text": f"Visit {number}: cough for {number + 2} days."}
                for number in range(JOB_DOCUMENTS)
            ]
        )
        batch = {"batch_size": JOB_LINES, "max_lines": JOB_LINES}
        place = Place(uri, DATABASE, fake.url, folder, batch=batch)
        assert run_killed(place, *JOB_POINT) == -signal.SIGKILL
        assert Counter(document["ai_status"] for document in items.find()) == {"in_progress": JOB_DOCUMENTS}
        facts = {
            name: fake.stats()[name]
            for name in ("batches_created", "files_uploaded", "lines_submitted", "lines_billed")
        }
        dump(client[DATABASE], target, {"items": "items"})
        slug = job_slug(place.config())
    write_json(target / "facts.json", facts)
    # Where cli.py looks for it; the helper of the tests has it elsewhere.
    keep_folder(folder / "state", target / "batch_files/openai_batch" / slug)
    keep_folder(folder / "openai", target / "openai")


# Settings


def record_settings(target: Path) -> None:
    """Write ``env``, the shipped example, and what both give."""
    (target / "env").write_text(ENV, encoding="utf-8")
    shutil.copy(ROOT / "config/.env.example", target / "env.example")
    for name in known_environment_names():
        os.environ.pop(name, None)
    loaders = {
        "Settings": load_settings,
        "ServiceSettings": load_service_settings,
        "OpenAISettings": load_openai_settings,
        "IndexSettings": load_index_settings,
    }
    values: dict[str, Any] = {
        file: {name: plain_values(load(target / file)) for name, load in loaders.items()}
        for file in ("env", "env.example")
    }
    values["names"] = sorted(known_environment_names())
    set_in_example = set(re.findall(r"^([A-Z_]+)=", (target / "env.example").read_text(), re.MULTILINE))
    assert set_in_example <= set(values["names"])
    write_json(target / "env_values.json", values)


def plain_values(settings: Any) -> dict[str, Any]:
    """Return all fields of *settings* as JSON has them, secrets in clear."""
    fields = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {
        name: value.get_secret_value()
        if hasattr(value, "get_secret_value")
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in fields.items()
    }


# Files


def keep_folder(folder: Path, target: Path) -> None:
    """Copy *folder*, its large binary files as NAME.gz."""
    shutil.copytree(folder, target)
    for path in [path for path in target.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        if len(content) >= PACKED_FROM_BYTES and b"\0" in content:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, mtime=0))
            path.unlink()


def dump(database: Database[Document], target: Path, names: dict[str, str]) -> None:
    """Write each collection of *names* as a file of Extended JSON, one document a line, and its UUID."""
    found = {
        each["name"]: each["info"]["uuid"] for each in database.command({"listCollections": 1})["cursor"]["firstBatch"]
    }
    facts = {}
    for collection, file in names.items():
        lines = [canonical(document) + "\n" for document in database[collection].find().sort("_id", 1)]
        (target / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
        facts[f"{file}.jsonl"] = {"collection": collection, "uuid": bytes(Binary(found[collection])).hex()}
    write_json(target / "collections.json", {"database": database.name, "files": facts})


def write_json(path: Path, value: Any) -> None:
    """Write *value* for people, too."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
