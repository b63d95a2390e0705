"""Mixture-of-experts checkpoints on the disk: families, layouts, pruning."""
