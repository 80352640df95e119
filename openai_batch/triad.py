"""Conversations through the Batch API: the classification core's prompt and parser, and the results collection of the worker.

The batch worker may run on the same collection. It takes what says pending, and also what says processing where no
lease speaks against it; so each conversation that is sent is leased in ``<source>_leases`` as the worker does, for
longer than any batch takes: no process of ours has to be alive to keep it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from aggregator import aggregate_conversation, document_shape
from classifier import Answer as ModelAnswer
from classifier import ReplyParser, build_outcome
from config import Settings, load_taxonomy
from domain.conversation import Conversation
from domain.result import build_result
from error_handler import JobProcessingError, LLMReplyError, Reason, SkippedDocumentError
from model_server.protocol import ChatReply, ChatTarget, plan_fingerprint
from mongo_client import DocumentStore, selection_filter
from openai_batch.answers import Answer
from openai_batch.documents import Variables, hidden, mask_of, masking_of, request_body
from openai_batch.job_config import AppConfig, Document, SchemaConfig
from prompt_builder import PromptBuilder
from storage.extended_json import canonical, id_key, loads

LEASE_S = 30 * 86_400.0  # renewed with each start; a batch takes a day, and may wait for tokens for some
IDS_AT_ONCE = 500


def worker_schema(schema: SchemaConfig) -> SchemaConfig:
    """Return *schema* narrowed to what the worker takes for pending; single queries say ``processed``, not a status."""
    own = selection_filter("pending")
    given = [schema.query_template] if schema.query_template else []
    return schema.model_copy(update={"query_template": {"$and": [own, *given]}})


def result_store(config: AppConfig, settings: Settings, job_id: str) -> DocumentStore:
    """Open the store of results and leases for *job_id*; whoever opens it closes it."""
    database = config.database
    place = {"mongodb_uri": database.uri, "db_name": database.name, "source_collection": database.collection}
    return DocumentStore(settings.model_copy(update={**place, "lease_s": LEASE_S}), worker_id=job_id)


class TriadHandling:
    """Labels conversations; *store* is where their results go."""

    def __init__(self, config: AppConfig, settings: Settings, store: DocumentStore, job_id: str) -> None:
        """Prepare prompt and parser.

        Raises:
            ConfigurationError: The taxonomy is wrong.
        """
        taxonomy = load_taxonomy(settings.taxonomy_file)
        self._prompts, self._parser = PromptBuilder.from_taxonomy(taxonomy), ReplyParser(taxonomy)
        schema = {"name": "triad", "strict": True, "schema": orjson.loads(self._parser.schema_json)}
        response_format = {"type": "json_schema", "json_schema": schema}
        self._openai = config.openai.model_copy(update={"response_format": response_format})
        self._target = ChatTarget(
            "openai_chat", config.openai.base_url, config.openai.base_url, config.openai.model, None, 0, "0"
        )
        self._plan = plan_fingerprint(self._target, self._prompts.system_prompt, self._parser.schema_json)
        self._store = store
        self._job_id = job_id
        self._keep_original = settings.store_original_conversation
        self._masking, self._variables = masking_of(config), Variables(config.fields)

    def request(self, document: Document) -> dict[str, Any]:
        """Return the body for *document*.

        Raises:
            JobProcessingError: There is nothing in it to label.
        """
        try:
            conversation = aggregate_conversation(document)
        except SkippedDocumentError as exc:
            raise JobProcessingError(f"{exc.reason}: {exc}", is_final=True, is_skip=True) from exc
        messages = self._prompts.build(conversation)
        if self._masking is not None:
            messages = hidden(messages, mask_of(self._masking, document, messages, self._variables))
        return request_body(self._openai, messages)

    def _restored(self, document: Document, conversation: Conversation, content: str) -> str:
        """Return *content* with the personal data put back that ``request`` had hidden."""
        if self._masking is None:
            return content
        return mask_of(self._masking, document, self._prompts.build(conversation), self._variables).restore_json(
            content
        )

    async def hold(self, documents: Sequence[Document]) -> set[str]:
        """Lease *documents*; return the ids (canonical) of those that no worker has."""
        keys = await self._store.claim([document["_id"] for document in documents])
        return {canonical(document["_id"]) for document in documents if id_key(document["_id"]) in keys}

    async def let_go(self, document_ids: Sequence[str]) -> None:
        """End the leases of *document_ids* (canonical)."""
        if document_ids:
            await self._store.release([loads(document_id) for document_id in document_ids])

    async def done(self, documents: Sequence[Document]) -> dict[str, Mapping[str, Any]]:
        """Return the update of those of *documents* that have a result already, by canonical id."""
        keys = await self._store.result_keys([document["_id"] for document in documents])
        return {
            canonical(document["_id"]): _ended(document) for document in documents if id_key(document["_id"]) in keys
        }

    def noted(self, error: str) -> dict[str, Any]:
        """Return what the worker writes to a document that ends with *error*, beside its status."""
        reason = error.partition(":")[0]
        known = reason if reason in set(Reason) else Reason.REFUSED
        return {"status_reason": str(known), "last_processed_at": datetime.now(UTC)}

    async def keep(self) -> None:
        """Make the leases of this job last again."""
        await self._store.renew_leases()

    async def deliver(self, answers: Sequence[Answer], _batch_id: str) -> list[Mapping[str, Any] | JobProcessingError]:
        """Store a result for each usable answer; one that is there already stays as it is."""
        made: list[dict[str, Any] | JobProcessingError] = [self._result(answer) for answer in answers]
        results = [result for result in made if not isinstance(result, JobProcessingError)]
        rejected = await self._store.write_results(results) if results else {}
        unstored = {id(results[place]) for place in rejected}
        return [
            result
            if isinstance(result, JobProcessingError)
            else JobProcessingError("MongoDB cannot hold the result", is_final=True)
            if id(result) in unstored
            else _ended(answer.document)
            for answer, result in zip(answers, made, strict=True)
        ]

    def _result(self, answer: Answer) -> dict[str, Any] | JobProcessingError:
        try:
            conversation = aggregate_conversation(answer.document)
            content = self._restored(answer.document, conversation, answer.line.content or "")
            labels = self._parser.parse(content)
        except SkippedDocumentError as exc:
            return JobProcessingError(f"{exc.reason}: {exc}", is_final=True)
        except LLMReplyError as exc:
            return JobProcessingError(f"{exc.reason}: {exc}")
        line = answer.line
        reply = ModelAnswer(labels, ChatReply(content, line.prompt_tokens, line.reply_tokens), answer.attempt)
        outcome = build_outcome(reply, conversation, self._target, self._plan, 0.0)
        return build_result(answer.document, conversation, outcome, self._job_id, keep_original=self._keep_original)


def _ended(document: Document) -> dict[str, Any]:
    """Return what the worker writes to a document that has its result."""
    update: dict[str, Any] = {"$set": {"last_processed_at": datetime.now(UTC)}, "$unset": {"status_reason": ""}}
    if document_shape(document) == "query":  # whose status is nobody's but this lane's
        update["$set"]["processed"] = True
        update["$inc"] = {"processing_attempts": 1}
    return update
