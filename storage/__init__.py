"""Durable local files and the formats in them: atomic replacement, journals, Extended JSON, the store's contract.

Import any module of it. Imports ``error_handler``, ``config`` and ``logger`` only.
"""
