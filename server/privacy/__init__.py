"""Client-level differential privacy on the server: the accountant, the budget, and the noise with its secret key."""
