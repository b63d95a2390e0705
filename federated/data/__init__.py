"""Documents, their partition over clients, and token blocks."""
