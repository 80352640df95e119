"""Clients of the REST service: protocol, retries, and a resumable run over a file.

``api_client`` and ``api_client_production`` import it. It imports what ``service`` may import.
"""
