"""Flower's processes, simulation runs and their results."""
