"""The project's ServerApp with measured costs, and its ClientApp with slow and failing clients."""
