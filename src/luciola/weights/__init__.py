"""Weights in files: Hugging Face folders read and written, GGUF files read."""
