"""Selection of the units and entries that a client ships, with error feedback."""
