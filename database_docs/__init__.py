"""Reads the structure of a database, describes it in texts, and stores them with the state of each item of the index.

``embedding_index``, ``service.similar`` and scripts import any module of it. It imports ``error_handler``, ``config`` and
``storage``; ``introspection`` needs requirements-index.txt.
"""
