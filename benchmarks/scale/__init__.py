"""Cost of the server by the number of clients: bytes, CPU seconds and memory of a round, measured and modeled."""
