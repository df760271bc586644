"""Holds kernel backends: the operations of a decoder on flat tensors."""
