"""The fake Ollama server itself; start it through ``tests/fakes/fake_ollama.py``."""
