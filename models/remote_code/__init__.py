"""Modeling code of expert graphs that is copied into checkpoints; imports torch and transformers only."""
