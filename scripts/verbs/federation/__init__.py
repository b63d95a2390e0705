"""Verbs that run a federation."""
