"""Knows how models write thoughts and calls of tools within their answers, and reads them."""
