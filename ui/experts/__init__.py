"""Experts tab: choice of the experts that stay, by saliency files."""
