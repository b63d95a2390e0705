"""Opened models and checkpoints: modeling code, bootstrap, graph state, MoE families, pruning, merging."""
