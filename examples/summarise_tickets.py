"""Summarise the pending documents of a collection from Python, without a schema file.

Requires OPENAI_API_KEY, MONGODB_URI, MONGODB_DB, MONGODB_SOURCE_COLLECTION and ALLOW_EXTERNAL_LLM=true. It can be stopped
and restarted; nothing is paid twice.
"""

from typing import Any

from openai_batch import DocumentBatchProcessor, DocumentFields, PromptConfig, SchemaConfig

schema = SchemaConfig(response_field="summary", response_content_field="text", response_date_field="made_at")
fields = DocumentFields(field_map={"subject": "subject", "text": "text"}, defaults={"subject": "no subject"})
prompts = PromptConfig(
    system_prompt="Summarise the ticket in one sentence.",
    user_prompt_template="Subject: {{ subject }}\n\n{{ text }}",
)


def with_length(response: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Return the stored form of an answer: its text, and its length relative to the ticket."""
    return {"sentence": response.strip(), "share": len(response) / max(1, len(document["text"]))}


if __name__ == "__main__":
    processor = DocumentBatchProcessor(schema_config=schema, fields=fields, prompts=prompts)
    processor.set_response_processor(with_length)
    result = processor.process_pending_documents(on_progress=print)
    print(f"{result.total_processed} documents: {result.succeeded} completed, {result.failed} failed")
