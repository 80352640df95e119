"""The server process behind ``tests/fakes/fake_openai.py``."""
