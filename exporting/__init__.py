"""Results as a table: columns, filters, and the files that ``cli.py export`` writes.

Parquet and XLSX need the packages of requirements-export.txt. ``commands.export`` imports this package.
"""
