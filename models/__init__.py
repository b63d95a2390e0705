"""What opens a model: modeling code, bootstrap, assembler, perplexity, export."""
