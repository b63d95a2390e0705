"""Chat tab: texts of the base model and of a result, side by side."""
