"""Loads OpenAI's tokenizer when it is imported: processes that are forked afterwards have its tables."""

from embedding_index.providers.openai_embeddings import openai_counter

if (count := openai_counter("text-embedding-3-small")) is not None:
    count("")
