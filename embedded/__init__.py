"""A real mongod and the built-in baseline classifier, for ``--embedded``.

``cli``, ``api`` and ``batch_processor`` import it. Imports ``domain`` and what is below it.
"""
