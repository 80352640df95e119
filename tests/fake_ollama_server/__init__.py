"""The fake Ollama server itself; start it through ``tests/fake_ollama.py``."""
