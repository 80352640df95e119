"""Batch workers on a Ray cluster, for ``--engine ray``.

Only ``cli`` imports it, and only for that flag. It imports ``batch_processor`` and the layers below it.
"""
