"""Choice of the resident experts: assembler, budgets, trial training."""
