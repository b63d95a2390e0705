"""What opens a model: modelling code, bootstrap, assembler, perplexity, export."""
