"""Weights in files: Hugging Face folders and GGUF files, read, written, converted, inspected and compared."""
