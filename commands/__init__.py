"""The subcommands of ``cli.py`` and what they print.

``cli`` imports it. It imports everything below ``cli``.
"""
