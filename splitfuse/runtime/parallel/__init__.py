"""Tensor parallelism: the other ranks of an engine, processes that compute its network together with it."""
