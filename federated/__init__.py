"""Code shared by client and server: updates, codec, selection, aggregation, protocol, data."""
