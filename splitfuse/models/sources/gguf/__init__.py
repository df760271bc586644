"""Reads models from GGUF files: one file with everything, in the format of llama.cpp."""
