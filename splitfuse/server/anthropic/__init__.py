"""Serves Anthropic's Messages API: request types, conversations, responses, endpoints."""
