"""Verbs on one expert graph: bootstrap, evaluate, generate, export, push."""
