"""Federated quality per byte: settings, jobs and their stored results, training, comparison."""
