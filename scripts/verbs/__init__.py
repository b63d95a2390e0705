"""The verbs of the ``fedgraft`` command."""
