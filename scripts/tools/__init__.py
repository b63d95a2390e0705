"""Programs for developers; no verbs."""
