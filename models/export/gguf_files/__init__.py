"""GGUF files of exported models, for llama.cpp."""
