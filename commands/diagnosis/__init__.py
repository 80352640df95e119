"""The checks of ``cli.py doctor``, one module per subject; each returns findings.

``commands.doctor`` and the diagnosis scripts import it. It imports what ``commands`` may import.
"""
