"""What ``--embedded`` brings: a real mongod and the built-in baseline classifier.

``cli``, ``api`` and ``batch_processor`` import it. Imports ``domain`` and what is below it.
"""
