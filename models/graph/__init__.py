"""State of an opened expert graph: masks, unit vectors, adapters, settings."""
