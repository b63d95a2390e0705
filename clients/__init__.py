"""The Flower ClientApp, its local trainer, and what a client keeps on its own disk."""
