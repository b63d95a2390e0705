"""The global model and its packed steps."""
