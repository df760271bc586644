"""Reads the quantized checkpoints of the Hugging Face Hub: GPTQ, AWQ, AutoRound, compressed-tensors, FP8, MXFP4."""
