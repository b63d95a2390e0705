"""Configuration, weight and side files of checkpoints on the disk."""
