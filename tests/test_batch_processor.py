"""The programmatic interface of the batch worker, as docs and spec promise it to other programs."""

from __future__ import annotations

import pytest

from batch_processor import BatchProcessor
from error_handler import SkippedDocumentError
from tests.worker.site import Site, check_results, check_statuses, conversation
from worker.intake import RunOptions


def processor_of(site: Site) -> BatchProcessor:
    assert site.model is not None
    return BatchProcessor(
        mongodb_uri=site.uri,
        db_name=site.database.name,
        ollama_endpoint=site.model.url,
        ollama_model="llama3.2",
        batch_files_dir=site.directory,
        batch_size=10,
        max_concurrent=5,
    )


async def test_fetch_returns_pending_documents_and_changes_nothing(site: Site) -> None:
    documents = [conversation(1), conversation(2, status="processed"), conversation(3)]
    site.source.insert_many(documents)
    async with processor_of(site) as processor:
        found = await processor.fetch_unprocessed_queries()
        first = await processor.fetch_unprocessed_queries(limit=1)
    assert [document["_id"] for document in found] == [1, 3]
    assert [document["_id"] for document in first] == [1]
    assert list(site.source.find()) == documents


async def test_process_document_stores_one_result_and_leaves_the_source(site: Site) -> None:
    document = conversation(1)
    site.source.insert_one(document)
    async with processor_of(site) as processor:
        result = await processor.process_document(document)
        with pytest.raises(SkippedDocumentError):
            await processor.process_document(conversation(2, messages=[]))
    assert result["source_conversation_id"] == 1
    check_results(site, [document])
    assert list(site.source.find()) == [document]


async def test_process_batch_classifies_the_given_documents_only(site: Site) -> None:
    documents = [conversation(number) for number in range(4)]
    site.source.insert_many(documents)
    async with processor_of(site) as processor:
        stats = await processor.process_batch(documents[:2])
    assert (stats["documents_processed"], stats["successful"], stats["failed"]) == (2, 2, 0)
    check_results(site, documents[:2])
    check_statuses(site, documents[:2])
    assert site.source.count_documents({"status": "pending"}) == 2


async def test_process_batch_keeps_the_checkpoint_of_an_interrupted_run(site: Site) -> None:
    """Without it, the next ``--reprocess`` would label all documents again."""
    documents = [conversation(number) for number in range(2)]
    site.source.insert_many(documents)
    async with processor_of(site) as processor:
        await processor.run(RunOptions(reprocess=True))
        before = processor.files.read_state("checkpoint.json") or {}
        processor.files.write_state("checkpoint.json", before | {"finished": False})
        site.source.insert_one(conversation(2))
        await processor.process_batch([conversation(2)])
        after = processor.files.read_state("checkpoint.json") or {}
    assert after == before | {"finished": False}


async def test_run_classifies_everything_and_close_gives_the_directory_back(site: Site) -> None:
    documents = [conversation(number) for number in range(12)]
    site.source.insert_many(documents)
    processor = processor_of(site)
    stats = await processor.run()
    await processor.close()
    await processor.close()
    assert (stats["documents_processed"], stats["successful"], stats["skipped"]) == (12, 12, 0)
    check_results(site, documents)
    async with processor_of(site) as another:
        assert (await another.run())["documents_processed"] == 0
