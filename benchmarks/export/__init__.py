"""Deviation of exported models from their expert graph, and speed of their GGUF files."""
