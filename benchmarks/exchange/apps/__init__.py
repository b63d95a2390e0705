"""Apps of the benchmark of exchanges."""
