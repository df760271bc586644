"""Runs fronts: processes that speak HTTP on the port of one server, and pass requests on to its own process."""
