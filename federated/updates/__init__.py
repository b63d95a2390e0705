"""Dense and sparse per-expert updates in memory."""
