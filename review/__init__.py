"""Corrections of labels by people: which conversations to show, what was decided, and how well reviewers agree.

``service`` and ``commands`` import it. It imports ``embedded``, ``mongo_client`` and the layers below them.
"""
