"""Compares labels with gold labels: accuracy, confusions, calibration, comparisons of two models, shares of labels.

It needs the packages of requirements-evaluation.txt. ``commands.evaluate`` imports it.
"""
