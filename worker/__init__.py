"""The batch run: intake, journal, settlement, retries, quarantine, progress and metrics.

``batch_processor`` and ``commands`` import it. Imports the LLM wrappers, ``mongo_client`` and what is below them.
"""
