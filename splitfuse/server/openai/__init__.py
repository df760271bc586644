"""Serves OpenAI's API: request types, endpoints, responses."""
