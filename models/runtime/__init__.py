"""Precision, memory, 4-bit weights, perplexity and generation of opened models."""
