"""Serves a live view of the engines: a page, and the stream of events that feeds it."""
