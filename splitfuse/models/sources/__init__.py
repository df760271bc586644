"""Stored models: where they are found (folder, Hub, bundled), and how their files and tensors are read."""
