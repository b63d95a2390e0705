"""Federated methods as the server runs them: request, validation of a reply, combination, graph edits."""
