"""Benchmark of the start of a client on a message."""
