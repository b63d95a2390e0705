"""Log files, TensorBoard events, call traces and the live table."""
