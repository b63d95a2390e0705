"""Expert graphs as plain data: masks, and edits of edges and experts."""
