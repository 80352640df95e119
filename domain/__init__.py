"""Values and pure functions about conversations and labels; no I/O except reading document files.

Import any module of it. Imports ``utils``, ``storage`` and what is below them.
"""
