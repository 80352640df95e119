"""The student: heads that take over conversations from the model under a promise, its certificate and its running audit.

``worker``'s callers and ``commands`` import it. It imports ``embedded`` and the layers below it; certificate and audit import none.
"""
