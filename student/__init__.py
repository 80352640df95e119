"""A small model that learns the labels of the language model from stored results, and answers in its place where it is sure.

Its method: docs/student.md. Its use: docs/student-use.md.
"""
