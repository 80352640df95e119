"""Readers of files: what help desks export, tables and JSON of any layout, become documents of the product's shapes.

Pure readers without MongoDB; scripts and the command line may import them, the worker and the service do not.
"""
