"""How to talk to a model server, without I/O: protocols, models, context window, tokens, breaker, concurrency.

Import any module of it. Imports ``domain`` and what is below it.
"""
