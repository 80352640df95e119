"""Durable files and MongoDB basics: atomic replacement, journals, SQLite, Extended JSON, driver errors.

Any higher layer may import any of its modules. It imports ``error_handler``, ``config`` and ``logger`` only.
"""
