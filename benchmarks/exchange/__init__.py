"""Benchmark of exchanges between a SuperLink and SuperNodes on loopback."""
