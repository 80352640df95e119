"""The checks of ``cli.py doctor``, one module per subject; each returns findings.

``commands.doctor`` and the diagnosis scripts import it. Imports what ``commands`` may import.
"""
