"""Flower processes, simulation runs and their results."""
