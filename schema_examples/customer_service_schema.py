"""Support conversations through the Batch API: the worker's labels, in the worker's results collection.

python cli.py openai-batch run --schema schema_examples/customer_service_schema.py --allow-external --mask-pii
"""

from openai_batch import DocumentFields, SchemaConfig, StatusConfig

customer_service_schema_config = SchemaConfig(
    status=StatusConfig(
        field_name="status",
        pending_value="pending",
        in_progress_value="processing",
        completed_value="processed",
        failed_value="failed",
        skipped_value="skipped",
        missing_is_pending=True,
    ),
)

# For --mask-pii: national phone numbers are read as those of this country.
document_fields = DocumentFields(phone_region="US")

# Prompt, schema and parser are those of the batch worker; results have the same fields.
results_of_conversations = True
