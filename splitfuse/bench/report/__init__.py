"""Reports and plots of benchmark results."""
