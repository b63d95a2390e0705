"""Robustness against hostile clients: attacks, federations with and without attackers."""
