"""Export of models to formats that other tools load: plain Llamas and mixtures of experts, GGUF files."""
