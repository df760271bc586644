"""Simulates figures of papers on disaggregated serving, beside Dynamic SplitFuse on the same machines."""
