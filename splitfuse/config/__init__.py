"""Defines the settings of engines and servers, parsed and checked once. Standard library only."""
