"""Packing of sparse updates: run lengths, quantization, low-rank factors, safetensors container."""
