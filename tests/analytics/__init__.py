"""Tests of the package analytics."""
