"""Local training of the experts that a client holds."""
