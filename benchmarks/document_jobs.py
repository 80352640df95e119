"""Memory and throughput of a document job, with the fake OpenAI."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from benchmarks.documents import short_conversations
from benchmarks.stage import DATABASE, ROOT, SOURCE
from benchmarks.table import Row
from benchmarks.worker_process import WorkerFailedError, WorkerProcess
from embedded.mongod import EmbeddedMongod
from tests.fakes.fake_openai import FakeOpenAI

MAX_MB = 200.0
RUN_LIMIT_S = 1500.0
LINES_OF_A_BATCH = 50_000

SCHEMA = """
from openai_batch import BatchConfig, DatabaseConfig, DocumentFields, OpenAIConfig, PromptConfig, SchemaConfig

schema_config = SchemaConfig()
fields = DocumentFields(field_map={{"first": "tweets.0.text", "second": "tweets.1.text"}})
prompts = PromptConfig(user_prompt_template="Summarise: {{{{ first }}}} / {{{{ second }}}}")
batch = BatchConfig(batch_size=500, poll_interval=1.0)
database = DatabaseConfig(uri={uri!r}, name={name!r}, collection={collection!r})
openai = OpenAIConfig(base_url={url!r}, api_key="sk-benchmark")
"""


def measure(*, quick: bool) -> list[Row]:
    """Run ``cli.py openai-batch run`` on a small and on a large collection."""
    small, large = (200, 2000) if quick else (2000, 100_000)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        mongod = stack.enter_context(EmbeddedMongod(folder / "mongod"))
        fake = stack.enter_context(FakeOpenAI(polls_until_done=2, record=False))
        client: MongoClient[Any] = stack.enter_context(MongoClient(mongod.uri))
        schema = {"uri": mongod.uri, "name": DATABASE, "collection": SOURCE, "url": fake.url}
        small_mb, _ = _job(folder / "small", client, fake, schema, small)
        large_mb, wall_s = _job(folder / "large", client, fake, schema, large)
    return [
        Row(
            f"document job: peak memory with {large} documents, compared with {small}, MB",
            f"{large_mb:.1f}",
            f"{small_mb:.1f}",
            f"{large_mb / small_mb:.2f}",
            f"<= {MAX_MB:g}",
            large_mb <= MAX_MB,
        ),
        Row("  documents/s of the whole process, including the time of the fake server", f"{large / wall_s:.0f}"),
    ]


def _job(
    folder: Path, client: MongoClient[Any], fake: FakeOpenAI, schema: dict[str, str], count: int
) -> tuple[float, float]:
    """Return peak MB and seconds of one whole job.

    Raises:
        WorkerFailedError: The job failed, or a document was not sent and completed exactly once.
    """
    folder.mkdir()
    (folder / "schema.py").write_text(SCHEMA.format(**schema), encoding="utf-8")
    client.drop_database(DATABASE)
    fake.reset()
    source = client[DATABASE][SOURCE]
    page: list[dict[str, Any]] = []
    for document in short_conversations(count):
        page.append(document | {"ai_status": "pending"})
        if len(page) == 2000:
            source.insert_many(page, ordered=False)
            page = []
    if page:
        source.insert_many(page, ordered=False)
    with WorkerProcess([ROOT / "cli.py", "openai-batch", "run", "--schema", "schema.py"], folder) as worker:
        usage = worker.wait(RUN_LIMIT_S)
        stats, peak_mb = fake.stats(), worker.peak_mb
    completed = source.count_documents({"ai_status": "completed"})
    batches = -(-count // LINES_OF_A_BATCH)
    paid = (stats["lines_billed"], stats["max_billed_per_line"], stats["batches_created"])
    if completed != count or paid != (count, 1, batches):
        raise WorkerFailedError(f"{completed} of {count} documents completed; lines, times, batches paid for: {paid}")
    return peak_mb, usage.wall_s
