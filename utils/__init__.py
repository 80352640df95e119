"""Small process helpers, and the modules with documented file names.

Import any module except the scripts. It imports ``storage`` and the layers below; the scripts import anything.
"""
