"""Durable files and MongoDB basics: atomic replacement, journals, SQLite, Extended JSON, connections, driver errors.

Import any module of it. It imports ``error_handler``, ``config`` and ``logger`` only.
"""
