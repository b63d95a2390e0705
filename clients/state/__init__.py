"""Files that a client keeps on its own disk between rounds."""
