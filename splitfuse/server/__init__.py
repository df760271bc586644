"""Serves over HTTP: dialects, admission, metrics, logs and the lifecycle of a server, over any EngineClient."""
