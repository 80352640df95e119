"""Benchmarks: the product compared with minimal loops without safeguards. See docs/performance.md."""
