"""Runs that are killed with SIGKILL and continued."""
