"""Thin entry points, one verb each: parse, call one function, print."""
