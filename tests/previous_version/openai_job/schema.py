"""The schema file of the job: an operator's own, written for the version that made the ledger."""

from openai_batch import BatchConfig, DocumentFields, PromptConfig, SchemaConfig

schema_config = SchemaConfig()
fields = DocumentFields(field_map={"text": "text"})
prompts = PromptConfig(user_prompt_template="Summarise: {{ text }}")
batch = BatchConfig(batch_size=4, max_lines=4)
