"""The network: one decoder; a family of models is data."""
