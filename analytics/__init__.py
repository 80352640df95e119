"""Labels of results with corrections, as counts that MongoDB computes, and charts of them as inline SVG.

``commands.report`` and the page of the service import it.
"""
