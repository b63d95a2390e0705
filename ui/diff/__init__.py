"""Diff tab: differences of two saliency files or two runs."""
