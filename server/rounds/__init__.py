"""The round loop: exchange of messages, validation, aggregation, graph edits."""
