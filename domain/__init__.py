"""Values and pure functions about conversations and labels; no I/O except reading document files.

Any higher layer may import any of its modules. It imports ``utils``, ``storage`` and the layers below them.
"""
