"""Alignment and similarity of experts that are merged."""
