"""Run and node configurations, their schemas, prompt templates, and the error type for bad input."""
