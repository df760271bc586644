"""How to compute: flat tensors in, tensors out. Knows no request, model or config."""
