"""Says what requests that generate nothing are made of, and what becomes of their numbers.

Pure functions of texts and numbers, for servers and pipelines alike.
"""
