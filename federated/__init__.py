"""What client and server agree on: updates, codec, selection, aggregation, usage, data partitioning."""
