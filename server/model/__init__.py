"""The global model and the packed steps that it ships."""
