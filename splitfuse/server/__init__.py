"""THE WIRE: HTTP, admission, metrics, logs, and the life of a server, over any EngineClient."""
