"""Flower apps and processes for tests."""
