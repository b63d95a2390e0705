"""Runs of ``benchmarks.quality_per_byte``: settings, results and training."""
