"""Protocol between clients and server: messages, steps, snapshots, copy hashes."""
