"""Small process helpers, and the modules with documented file names.

Any higher layer may import any of its modules except the scripts. It imports ``storage`` and the layers below; the scripts may
import anything.
"""
