"""The batch run: intake, deduplication, settlement, retries, quarantine, progress and metrics.

Any higher layer may import any of its modules. It imports the LLM wrappers, ``mongo_client`` and the layers below them.
"""
