"""Run configurations, the schema that validates them, prompt templates, and the error type for bad input."""
