"""Run the medical schema from Python, like ``cli.py openai-batch run --schema``.

Requires the environment variables of examples/summarise_tickets.py. Text is sent to OpenAI with names and numbers masked.
"""

from pathlib import Path

from openai_batch import DocumentBatchProcessor
from openai_batch.schema_file import load_schema_file

SCHEMA = Path(__file__).parent.parent / "schema_examples/medical_schema.py"

if __name__ == "__main__":
    processor = DocumentBatchProcessor(schema_file=load_schema_file(SCHEMA), mask_pii=True)
    result = processor.process_pending_documents()
    print(f"{result.succeeded} of {result.total_processed} patients have talking points")
