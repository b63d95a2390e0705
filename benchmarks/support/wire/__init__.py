"""Updates and peers of the benchmark of the wire format."""
