"""Loading, saving and dense export of checkpoints."""
