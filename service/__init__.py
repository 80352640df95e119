"""The REST service: routes, access, limits, admission, errors, metrics. ``service.client`` is the client.

``main``, ``api``, ``embedding_index.similar*`` and the client scripts import it. It imports ``embedded.baseline`` and the
layers below ``worker``.
"""
