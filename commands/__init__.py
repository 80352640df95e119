"""The subcommands of ``cli.py`` and what they print.

``cli`` imports it. Imports everything below ``cli``.
"""
