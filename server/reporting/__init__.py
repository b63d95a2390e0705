"""Run logs, TensorBoard events, call traces and the live table."""
