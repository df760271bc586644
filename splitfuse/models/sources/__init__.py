"""Finds stored models (folder, Hub, bundled), and reads their files and tensors."""
