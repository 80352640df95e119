"""The embedding providers: OpenAI, Ollama, and one inside this process."""
