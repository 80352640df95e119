"""A real mongod and the built-in baseline classifier, for ``--embedded``.

``cli``, ``api`` and ``batch_processor`` import it. It imports ``domain`` and the layers below it.
"""
