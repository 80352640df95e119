"""The server process behind ``tests/fake_openai.py``."""
