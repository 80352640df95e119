"""Connections to other machines: the HTTP clients with their proxies and certificates, and which addresses others can reach.

Any higher layer may import any of its modules. It imports ``error_handler`` and ``config`` only.
"""
