"""Messages between client and server: steps, snapshots, copy hashes."""
