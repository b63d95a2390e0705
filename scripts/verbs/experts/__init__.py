"""Verbs of the expert workbench."""
