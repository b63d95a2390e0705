"""Measurements against peers: ``python -m benchmarks.NAME [--quick] [--json]``."""
