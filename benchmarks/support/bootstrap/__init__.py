"""Quality, time and memory of bootstraps."""
