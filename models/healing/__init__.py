"""Distillation of an expert graph from its dense base."""
