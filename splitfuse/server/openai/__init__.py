"""OpenAI's API: request types, validation, endpoints, responses."""
