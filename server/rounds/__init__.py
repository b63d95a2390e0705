"""The round loop: requests, validation of the answers, logs."""
