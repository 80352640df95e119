"""The model server without I/O: protocols, models, context window and truncation, tokens, breaker, concurrency.

Any higher layer may import any of its modules. It imports ``domain`` and the layers below it.
"""
