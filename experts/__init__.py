"""What an expert is, without opening a model: clustering, the graph, its edits."""
