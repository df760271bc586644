"""Describes families of models as data: from config.json to a ModelSpec."""
