"""The model server without I/O: protocols, models, context window, truncation, tokens, breaker, concurrency.

Import any module of it. Imports ``domain`` and what is below it.
"""
