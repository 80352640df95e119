"""Conversations through the Batch API, with the worker's prompt, parser and results collection.

The batch worker may run on the same collection. It takes pending documents, and documents in processing without a
lease. So each conversation that is sent is leased in ``<source>_leases``, for longer than any batch takes: no process
has to stay alive to renew the lease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from aggregator import aggregate_conversation, document_shape
from classifier import Classifier
from config import Settings, load_prompt_taxonomy
from config.settings import DEFAULT_STATUS_FIELD
from domain.conversation import Classification, Outcome, ResultOptions, build_result, result_fingerprint
from domain.reply_style import MAX_CATEGORIZATION_CHARACTERS
from domain.text import one_line
from error_handler import (
    JobProcessingError,
    LLMReplyError,
    Reason,
    SkippedDocumentError,
    UnreadableDocumentError,
)
from model_server.protocol import ChatTarget
from mongo_client import DocumentStore
from openai_batch.documents import Variables, request_body
from openai_batch.job_config import AppConfig, Document, SchemaConfig, value_at
from openai_batch.job_store import Answer, Handling
from storage.extended_json import canonical, id_key, loads
from storage.selection import StateFields

LEASE_S = 30 * 86_400.0  # renewed by each start; a batch takes a day and may wait several days for tokens


def worker_schema(schema: SchemaConfig, states: StateFields) -> SchemaConfig:
    """Return *schema* narrowed to what the worker selects; its status is in the field of *states* if it was in ``status``."""
    own = states.queries["pending"]
    given = [schema.query_template] if schema.query_template else []
    changes: dict[str, Any] = {"query_template": {"$and": [own, *given]}}
    if schema.status.field_name == DEFAULT_STATUS_FIELD:
        changes["status"] = schema.status.model_copy(update={"field_name": states.status})
    return schema.model_copy(update=changes)


def result_store(config: AppConfig, settings: Settings, job_id: str) -> DocumentStore:
    """Return the store of results and leases for *job_id*; the caller closes it."""
    database = config.database
    place = {"mongodb_uri": database.uri, "db_name": database.name, "source_collection": database.collection}
    return DocumentStore(settings.model_copy(update={**place, "lease_s": LEASE_S}), worker_id=job_id)


class TriadHandling(Handling):
    """Labels conversations and leases them; their results go to *store*."""

    def __init__(self, config: AppConfig, settings: Settings, store: DocumentStore, job_id: str) -> None:
        """Build the classifier; raise ConfigurationError if the taxonomy is malformed."""
        taxonomy = load_prompt_taxonomy(settings)
        self.field_names = taxonomy.field_names
        self._classifier = Classifier(taxonomy)
        schema = {"name": "triad", "strict": True, "schema": orjson.loads(self._classifier.schema_json)}
        response_format = {"type": "json_schema", "json_schema": schema}
        self._openai = config.openai.model_copy(update={"response_format": response_format})
        self._target = ChatTarget(
            "openai_chat", config.openai.base_url, config.openai.base_url, config.openai.model, None, 0, "0"
        )
        self._plan = self._classifier.plan(self._target)
        self._store, self._states = store, store.states
        self._job_id = job_id
        self._result_options = ResultOptions.of(settings)
        self._variables = Variables(config)
        self._sent_hash = f"{config.schema_config.processing_info_field}.input_sha256"

    def request(self, document: Document) -> dict[str, Any]:
        """Return the body for *document*; raise JobProcessingError if it has nothing to label."""
        try:
            conversation = aggregate_conversation(document)
        except SkippedDocumentError as exc:
            is_skip = not isinstance(exc, UnreadableDocumentError)
            raise JobProcessingError(f"{exc.reason}: {exc}", is_final=True, is_skip=is_skip) from exc
        messages = self._variables.hide(document, self._classifier.messages(conversation.transcript))
        return request_body(self._openai, messages, is_reasoning=self.is_reasoning)

    async def acquire(self, documents: Sequence[Document]) -> set[str]:
        """Lease *documents*; return the canonical ids of those that no worker holds."""
        keys = await self._store.claim([document["_id"] for document in documents])
        return {canonical(document["_id"]) for document in documents if id_key(document["_id"]) in keys}

    async def release(self, document_ids: Sequence[str]) -> None:
        """End the leases of *document_ids* (canonical)."""
        if document_ids:
            await self._store.release([loads(document_id) for document_id in document_ids])

    def claim_fields(self, document: Document) -> dict[str, Any]:
        """Return the hash of the text that is sent; the conversation may have another one when the answer comes."""
        return {"input_sha256": aggregate_conversation(document).transcript_sha256}

    async def done(self, documents: Sequence[Document]) -> dict[str, Mapping[str, Any]]:
        """Return the updates of those of *documents* that have a result of their present text, by canonical id."""
        made = await self._store.result_provenance([document["_id"] for document in documents])
        return {
            canonical(document["_id"]): self._final_update(document)
            for document in documents
            if (result := made.get(id_key(document["_id"]))) is not None
            and _is_of_text(result, aggregate_conversation(document).transcript_sha256)
        }

    def failure_fields(self, error: str) -> dict[str, Any]:
        """Return the fields that the worker sets, beside the status, on a document that ends with *error*."""
        reason = error.partition(":")[0]
        known = reason if reason in set(Reason) else Reason.REFUSED
        return {self._states.reason: str(known), self._states.processed_at: datetime.now(UTC)}

    async def deliver(self, answers: Sequence[Answer], _batch_id: str) -> list[Mapping[str, Any] | JobProcessingError]:
        """Store a result for each usable answer; a result of the same text is kept, one of another text replaced."""
        made = [self._result(answer) for answer in answers]
        results = [result for result in made if not isinstance(result, JobProcessingError)]
        known = await self._store.result_provenance([result["source_conversation_id"] for result in results])
        unstored: set[int] = set()
        for replaces in (False, True):
            group = [result for result in results if _replaces(result, known) is replaces]
            rejected = await self._store.write_results(group, replace=replaces) if group else {}
            unstored |= {id(group[place]) for place in rejected}
        return [
            result
            if isinstance(result, JobProcessingError)
            else JobProcessingError("MongoDB cannot store the result", is_final=True)
            if id(result) in unstored
            else self._final_update(answer.document)
            for answer, result in zip(answers, made, strict=True)
        ]

    def _result(self, answer: Answer) -> dict[str, Any] | JobProcessingError:
        try:
            conversation = aggregate_conversation(answer.document)
            labels = self._classifier.parse(answer.line.content or "")
            mask = self._variables.mask(answer.document, self._classifier.messages(conversation.transcript))
            if mask is not None and labels.categorization is not None:
                restored = one_line(mask.restore(labels.categorization), MAX_CATEGORIZATION_CHARACTERS)
                labels = Classification(categorization=restored, **labels.labels)
        except SkippedDocumentError as exc:
            return JobProcessingError(f"{exc.reason}: {exc}", is_final=True)
        except LLMReplyError as exc:
            return JobProcessingError(f"{exc.reason}: {exc}")
        except JobProcessingError as exc:  # the conversation has grown too long for masking
            return exc
        sent = str(value_at(answer.document, self._sent_hash, conversation.transcript_sha256))
        outcome = Outcome(
            labels,
            model_used=self._target.model,
            model_digest=self._target.digest,
            input_sha256=sent,
            fingerprint=result_fingerprint(self._plan, sent),
            plan=self._plan,
            attempts=answer.attempt,
            prompt_tokens=answer.line.prompt_tokens,
            reply_tokens=answer.line.reply_tokens,
        )
        return build_result(answer.document, conversation, outcome, self._job_id, self._result_options)

    def _final_update(self, document: Document) -> dict[str, Any]:
        """Return the update with which the worker completes *document*; the job sets the status itself."""
        states = self._states
        update: dict[str, Any] = {"$set": {states.processed_at: datetime.now(UTC)}, "$unset": {states.reason: ""}}
        if states.is_default and document_shape(document) == "query":  # the worker sets no status on these
            update["$set"]["processed"] = True
            update["$inc"] = {"processing_attempts": 1}
        return update


def _is_of_text(result: Mapping[str, Any], transcript_sha256: str) -> bool:
    """Return whether the stored *result* is of this text; early versions stored no hash."""
    return value_at(result, "processing_metadata.input_sha256", None) in (None, transcript_sha256)


def _replaces(result: Mapping[str, Any], known: Mapping[bytes, Mapping[str, Any]]) -> bool:
    """Return whether one of the *known* results is of the same conversation as *result*, and of another text."""
    old = known.get(id_key(result["source_conversation_id"]))
    return old is not None and not _is_of_text(old, result["processing_metadata"]["input_sha256"])
