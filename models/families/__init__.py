"""Families of mixtures of experts: one entry each, for the stored and the opened model."""
