"""How near the CPU kernels come to what the machine gives."""
