"""Verb of the web page."""
