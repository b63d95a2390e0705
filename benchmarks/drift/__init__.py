"""Recovery of a federation from a change of its clients' domain, with and without growth of the expert graph."""
