"""The Flower ServerApp, its strategy, state, run log, and the driver of a simulation."""
