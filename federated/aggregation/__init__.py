"""Per-expert aggregation of client updates and of usage counts."""
