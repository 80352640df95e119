"""The REST service: routes, access, limits, admission, errors, metrics. ``service.client`` is the client.

``main``, ``api`` and the client scripts import it. It imports ``embedded.baseline``, ``embedding_index`` (late: it is
optional), ``database_docs.items`` and the layers below ``worker``.
"""
