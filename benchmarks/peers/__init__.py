"""The engines we compare with, and ours, under one workload. Knows nothing of how any of them works inside."""
