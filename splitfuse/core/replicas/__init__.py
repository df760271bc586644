"""Decides among several engines: which one a request goes to, and how many a load needs."""
