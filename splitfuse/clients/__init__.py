"""Connects to splitfuse servers, asynchronously and blocking."""
