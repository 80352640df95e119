"""Small process helpers, and the modules whose file names are documented.

Import any module except the scripts. Imports ``storage`` and what is below it; the scripts import anything.
"""
