"""Construction of an expert graph from a dense Llama."""
