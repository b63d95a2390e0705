"""The Flower ServerApp: global model, strategies, round loop, run logs, and the driver of a simulation."""
