"""Loading and saving of checkpoints."""
