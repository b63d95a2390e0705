"""The state of a run between rounds: node sessions, usage averages, early stopping, checkpoints."""
