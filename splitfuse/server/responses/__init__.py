"""Speaks OpenAI's Responses API: items in, items out, and answers that the server keeps."""
