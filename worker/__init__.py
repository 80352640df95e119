"""The batch run: intake, deduplication, settlement, retries, quarantine, progress and metrics.

Import any module of it. It imports the LLM wrappers, ``mongo_client`` and the layers below them.
"""
