"""Experts as data, without opening a model: clustering, graphs, saliency, selection, merging."""
