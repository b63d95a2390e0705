"""Perplexity against epsilon of client-level differential privacy."""
