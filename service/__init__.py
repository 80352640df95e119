"""What surrounds POST /classify: access, limits, admission, errors, metrics; ``service.client`` is for its callers.

``api``, ``main`` and the client scripts import it. Imports ``worker`` and what is below it.
"""
