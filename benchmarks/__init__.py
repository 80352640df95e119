"""Measurements of the batch worker beside a yardstick that has no safety at all; docs/performance.md."""
