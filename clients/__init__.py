"""Flower ClientApp: local training, choice of resident experts, and state on the client's disk."""
