"""Check, tune and measure the Triton kernels on a GPU."""
