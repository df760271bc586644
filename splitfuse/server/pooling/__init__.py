"""Serves the routes that generate nothing: embeddings, reranking, scores and decisions."""
